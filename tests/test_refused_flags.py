"""Wrong flags, files of flags and folders: one line that names them, exit code 2, before anything is written."""

import json
import shutil
import sys

import pytest
from helpers import ending, installed, words_of
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import PreTrainedConfig

from hf_relpos import RelPosForCausalLM, cli
from hf_relpos.cli import describe
from hf_relpos.experiments.grid import load_experiment
from hf_relpos.model_loading import check_folder, load_model


# --- flags and files of flags


EXPERIMENTS = {
    "a misspelt section": ({"grids": {"seed": [1]}}, "did you mean 'grid'?"),
    "a misspelt flag": ({"grid": {"learning_rat": [1]}}, "did you mean 'learning_rate'?"),
    "a misspelt scheme": ({"grid": {"pos_embedding_type": ["alibbi"]}}, "Did you mean 'alibi'?"),
    "a misspelt field": ({"grid": {"config_overrides": ["num_hidden_layer=2"]}}, "did you mean 'num_hidden_layers'?"),
    "a file that is a number": ({"grid": {"seed": [1]}, "train": {"train_file": 10**30}}, "No such file"),
    "a file that is a list": ({"grid": {"seed": [1]}, "train": {"validation_file": [[]]}}, "takes one value"),
    "10^7 layers": ({"grid": {"config_overrides": ["num_hidden_layers=10000000"]}}, "`num_hidden_layers` must be at"),
    "a width of 10^9": ({"grid": {"config_overrides": ["hidden_size=1000000000"]}}, "weights (`hidden_size`"),
    "a number past all bounds": ({"grid": {"max_steps": [10**30]}}, "`max_steps` must be below 2^63"),
    "a rate that is a dictionary": ({"grid": {"learning_rate": [{"x": 1}]}}, "invalid float value"),
    "a rotation of no type": (
        {"grid": {"pos_embedding_type": ["rotary"], "rope_parameters": [{"rope_type": []}]}},
        "'rope",
    ),
    "lengths past the table": (
        {"grid": {"pos_embedding_type": ["learned"]}, "evaluate": {"eval_lengths": [128, 256]}},
        "`eval_lengths` must be at most 128, the rows of the learned table",
    ),
    "lengths past the table, by default": (
        {"grid": {"pos_embedding_type": ["rotary", "sinusoidal+learned"]}},
        "`eval_lengths` must be at most 128, the rows of the learned table (`max_position_embeddings`), got 1024",
    ),
    "lengths past the table of a finetuned model": (
        {"grid": {"pos_embedding_type": ["none"]}, "finetune": {"pos_embedding_type": ["learned"]}},
        "`eval_lengths` must be at most 128",
    ),
    "lengths of another type": ({"grid": {"seed": [1]}, "evaluate": {"eval_lengths": "x"}}, "invalid int value"),
}


@pytest.mark.parametrize("content, message", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_an_experiment_is_refused_before_any_run(content, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "e.yaml").write_text(json.dumps(content))
    words = ["--experiment", tmp_path / "e.yaml", "--output_dir", tmp_path / "out"]
    line = ending(monkeypatch, capsys, "sweep", *words)
    assert message in line and str(tmp_path / "e.yaml") in line and not (tmp_path / "out").exists()


def test_tables_that_are_long_enough_are_not_refused(tmp_path):
    content = {"grid": {"pos_embedding_type": ["learned"]}, "train": {"max_position_embeddings": 1024}}
    content |= {"finetune": {"block_size": [2048], "extend_learned_positions": [True]}}
    (tmp_path / "e.yaml").write_text(json.dumps(content))
    assert len(load_experiment(str(tmp_path / "e.yaml"))) == 2


@pytest.mark.parametrize(
    "content, message",
    [
        ("learning_rate: fast", "--config '{}': argument --learning_rate/--learning-rate: invalid float value: 'fast'"),
        ("max_steps: 1" + "0" * 30, "--config '{}': `max_steps` must be below 2^63, got a number of 31 digits"),
        ("seed: [1, [2]]", "--config '{}': `seed` takes one value, got [1, [2]]."),
        ("eval_strategy: sometimes", "--config '{}': argument --eval_strategy/--eval-strategy: invalid choice"),
        ("lr_scheduler_type: []", "--config '{}': `lr_scheduler_type` takes one value, got []"),
        ("learning_rates: 1", "--config '{}' holds an unknown flag: 'learning_rates' (did you mean 'learning_rate'?)"),
        ("config_overrides: hidden_sise=3", "got 'hidden_sise=3' (did you mean 'hidden_size'?)"),
        ("config_overrides: 'hidden_size=" + "[" * 999 + "'", "nested too deeply"),
        ("rope_parameters: {rope_type: [x]}\npos_embedding_type: rotary", "'rope_type' must be one of"),
        ("pos_embedding_type: rotray", "Did you mean 'rotary'?"),
    ],
)
def test_a_file_of_flags(content, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "c.yaml").write_text(content)
    line = ending(monkeypatch, capsys, "train", "--config", tmp_path / "c.yaml", "--output_dir", tmp_path / "x")
    assert message.format(tmp_path / "c.yaml") in line and not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_a_number_that_is_none_on_the_command_line(value, tmp_path, monkeypatch, capsys):
    line = ending(monkeypatch, capsys, "train", f"--learning_rate={value}", "--output_dir", tmp_path / "x")
    assert "`learning_rate` must be a finite number" in line


# --- folders


def test_a_missing_folder_is_no_question_for_the_hub(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", None)  # whoever asks the Hub fails
    for name, hint in (
        ("linear_cbp", " (did you mean 'linear_cpb'?)"),
        ("./nothing", ""),
        ("none/nothing", ""),
        ("none/checkpoint-7", " (did you mean 'none/checkpoint-"),
        ("no/such/folder", ""),
        (tmp_path / "nothing", ""),
        ("~nobody/model", ""),
    ):
        line = ending(monkeypatch, capsys, "generate", "--model_name_or_path", name, "--prompt", "x")
        assert f"`model_name_or_path` {str(name)!r}: there is no such folder{hint}" in line and "Hub" not in line


def test_a_name_that_is_neither_folder_nor_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = ending(monkeypatch, capsys, "generate", "--model_name_or_path", "alice/model", "--prompt", "x")
    assert "`model_name_or_path` 'alice/model' cannot be loaded: it is no folder, and HF_HUB_OFFLINE is set." in line
    line = ending(monkeypatch, capsys, "import", "alice/model", "out")
    assert "`model` 'alice/model' is no folder, and HF_HUB_OFFLINE is set." in line


@pytest.mark.parametrize(
    "cause, why",
    [
        (LocalEntryNotFoundError("no route"), "the Hub cannot be reached for it."),
        (None, "the Hub gives no such model: alice/model is not a valid model identifier."),
    ],
    ids=["no network", "no such repository"],
)
def test_a_name_that_the_hub_does_not_give(cause, why, tmp_path, monkeypatch, capsys):
    def ask(name):
        raise OSError(f"{name} is not a valid model identifier") from cause

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("hf_relpos.RelPosConfig.get_config_dict", ask)
    line = ending(monkeypatch, capsys, "generate", "--model_name_or_path", "alice/model", "--prompt", "x")
    assert line.endswith(f"`model_name_or_path` 'alice/model' cannot be loaded: it is no folder, and {why}")


def test_a_misspelt_folder_is_told_before_the_hub_is_asked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "alibi").mkdir()
    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    for program in ("finetune", "train", "evaluate", "generate"):
        words = [
            "--model_name_or_path",
            "alibii",
            *(["--prompt", "x"] if program == "generate" else ["--output_dir", "x"]),
        ]
        line = ending(monkeypatch, capsys, program, *words)
        assert "`model_name_or_path` 'alibii': there is no such folder (did you mean 'alibi'?)" in line, program


def test_a_name_that_is_looked_up_on_the_hub_is_said_so_once(monkeypatch, capsys):
    for offline, said in ((True, ""), (False, "no folder 'alice/other' here: asking the Hub\n"), (False, "")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        check_folder("alice/other" if not offline else "alice/one")
        assert capsys.readouterr().err == said


def test_an_interrupted_run_is_told_by_its_checkpoints(trained, data_flags, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    for name in ("checkpoint-3", "checkpoint-6"):
        shutil.copytree(trained / "none" / name, folder / name)
    (folder / "checkpoint-99").mkdir()
    for program in installed("generate", "evaluate", "finetune", "push", "serve"):
        line = ending(monkeypatch, capsys, program, *words_of(program, folder, data_flags, tmp_path / "x"))
        assert f"name its checkpoint, '{folder / 'checkpoint-6'}'" in line and "--resume_from_checkpoint last" in line
    assert load_model(str(folder / "checkpoint-6"), RelPosForCausalLM)


# --- what nobody foresaw


def broken() -> None:
    {}["position"]


@pytest.mark.parametrize(
    "flags, environment, shown",
    [
        ([], None, False),
        (["--debug"], None, True),
        (["--debug", "true"], None, True),
        (["--debug", "false"], None, False),
    ]
    + [([], "1", True), ([], "0", False)],
)
def test_the_traceback_is_shown_when_it_is_asked_for(flags, environment, shown, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-relpos", *flags])
    if environment is not None:
        monkeypatch.setenv("HF_RELPOS_DEBUG", environment)
    with pytest.raises(SystemExit, match="2"):
        cli.command(broken)()
    *before, line = capsys.readouterr().err.splitlines()
    assert line.startswith("hf-relpos: error: unexpected KeyError: 'position' (") and "--debug shows" in line
    assert bool(before) == shown and ("Traceback" in "".join(before)) == shown


def test_debug_stays_a_flag_of_transformers(monkeypatch):
    argv = ["train.py", "--debug", "underflow_overflow"]
    monkeypatch.setattr(sys, "argv", argv)
    cli.command(lambda: None)()
    assert argv == ["train.py", "--debug", "underflow_overflow"]


def test_memory_and_long_lines():
    assert describe(MemoryError("x")) == "there is not enough memory: MemoryError: x"
    assert describe(ImportError("install x")) == "a package is missing: install x"
    assert len(describe(ValueError("x" * 10**6))) < 2000 and describe(ValueError("a\nb")) == "a b"
