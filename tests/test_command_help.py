"""The pages of `--help`: what stands first, what last, and that each flag stands there once."""

import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT
from transformers import TrainingArguments

from hf_relpos.cli import COMMANDS, main
from hf_relpos.model.configuration_relpos import MODEL_SIZES
from hf_relpos.model.position_augmentation import SAMPLINGS
from hf_relpos.training.arguments import FinetuningArguments, RelPosTrainingArguments
from hf_relpos.training.model_arguments import ModelArguments


PAGES = [name for name in COMMANDS if name != "serve"]  # which transformers prints


def page(monkeypatch, capsys, name: str) -> str:
    monkeypatch.setattr(sys, "argv", ["hf-relpos", name, "--help"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


def sections(text: str) -> dict[str, list[str]]:
    """Title → the flags of its section, in the order of the page."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if title := re.fullmatch(r"(\S.*):", line):
            found[title[1]] = []
        elif (flag := re.match(r"  (?:-h, )?--(\w+)", line)) and found:
            [*found.values()][-1].append(flag[1])
    return found


@pytest.mark.parametrize("name", PAGES)
def test_usual_flags_come_first_and_each_flag_once(name, monkeypatch, capsys):
    text = page(monkeypatch, capsys, name)
    found = sections(text)
    flags = [flag for group in found.values() for flag in group]
    assert len(flags) == len(set(flags)) and "default: None" not in text and max(map(len, text.splitlines())) <= 120
    assert all(re.search(rf"^  --{flag}\b.*(?:  \S|\n {{20,}}\S)", text, re.M) for flag in flags if flag != "help")
    assert not re.search(r"\b(train|finetune|evaluate|sweep|compare|report|generate|demo|serve)\.py", text)
    assert [*found][-1] == "of every sub-command" and found["of every sub-command"] == ["help", "config", "import_file"]
    usage = text.partition("\n")[0]
    assert usage.startswith(f"usage: hf-relpos {name} ") and usage.endswith("[flags]") and len(usage) < 100
    if name not in ("schemes", "export"):  # without flags of their own
        assert [*found][0] == "usual flags" and 2 <= len(found["usual flags"]) <= 11


@pytest.mark.parametrize("name", PAGES)
def test_each_flag_says_what_happens_without_it(name, monkeypatch, capsys):
    text = page(monkeypatch, capsys, name)
    helps = re.split(r"^  (?=--\w)", text, flags=re.M)[1:]
    assert len(helps) >= 2
    for entry in helps:
        entry = " ".join(re.split(r"\n\n|\n\S", entry)[0].split())
        flag = entry.split()[0].removeprefix("--")
        assert re.search(r"default|\(required\)|without it|without --", entry), entry
        assert not re.search(r"^(output_dir|model_name_or_path)$", flag) or "not set" not in entry or name == "train"
    if name in ("train", "finetune"):
        assert "10,000 by default, 1,000 by finetune" in " ".join(text.split())
        assert (RelPosTrainingArguments.default_steps, FinetuningArguments.default_steps) == (10_000, 1000)
        assert "(default: 0.0)" in " ".join(next(each for each in helps if each.startswith("--weight_decay")).split())


SAME_FLAGS = [
    ("train", "--text", "--train_file"),
    ("train", "--data=x", "--train_file"),
    ("train", "--lr", "--learning_rate"),
    ("train", "--steps", "--max_steps"),
    ("train", "--epochs", "--num_train_epochs"),
    ("train", "--seeds", "--seed"),
    ("train", "--output", "--output_dir"),
    ("train", "-o", "--output_dir"),
    ("train", "--scheme", "--pos_embedding_type"),
    ("train", "--schemes", "--pos_embedding_type"),
    ("train", "--train_length", "--block_size"),
    ("train", "--batch-size", "--per_device_train_batch_size"),
    ("train", "--hidden_size", "--config_overrides"),
    ("train", "--tokenizer", "--tokenizer_name"),
    ("train", "--resume", "--resume_from_checkpoint"),
    ("finetune", "--model", "--model_name_or_path"),
    ("finetune", "--text", "--train_file"),
    ("evaluate", "--text", "--validation_file"),
    ("evaluate", "--model", "--model_name_or_path"),
    ("evaluate", "--lengths", "--eval_lengths"),
    ("evaluate", "--out_dir", "--output_dir"),
    ("generate", "--text", "--prompt"),
    ("generate", "--max_length", "--max_new_tokens"),
    ("compare", "--train_file", "--text"),
    ("compare", "--pos_embedding_type", "--schemes"),
    ("compare", "--block_size", "--train_length"),
    ("compare", "--seed", "--seeds"),
    ("compare", "--time", "--budget"),
    ("compare", "--eval_lengths", "--run_length"),
    ("compare", "--out", "--output_dir"),
    ("sweep", "--grid", "--experiment"),
    ("sweep", "--jobs", "--num_parallel"),
    ("report", "--out", "--output_dir"),
    ("train", "--learning_rat", "--learning_rate"),  # spelt alike
]


@pytest.mark.parametrize("name, given, meant", SAME_FLAGS, ids=lambda value: value.strip("-"))
def test_a_flag_of_another_name_is_known(name, given, meant, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-relpos", name, given, "x"])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert f"unknown flag: {given!r} (did you mean {meant!r}?)" in said


def test_a_flag_of_another_name_in_a_file_is_known(tmp_path, monkeypatch, capsys):
    (tmp_path / "flags.yaml").write_text("lr: 1e-3\n")
    monkeypatch.setattr(sys, "argv", ["hf-relpos", "train", "--config", str(tmp_path / "flags.yaml")])
    with pytest.raises(SystemExit, match="2"):
        main()
    assert "unknown flag: 'lr' (did you mean 'learning_rate'?)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["train", "finetune"])
def test_what_transformers_has_comes_last_by_purpose(name, monkeypatch, capsys):
    found = sections(page(monkeypatch, capsys, name))
    titles = [*found]
    assert titles[:4] == ["usual flags", "the model", "the text", "the training"] and len(found["usual flags"]) == 10
    assert found["usual flags"][0] == {"train": "output_dir", "finetune": "model_name_or_path"}[name]
    theirs = {each.name for each in fields(TrainingArguments) if each.init}
    assert "other flags" not in titles  # each has a purpose
    ours = {each.name for each in fields(FinetuningArguments)}  # some of which have a purpose of theirs too
    assert all(set(found[title]) <= theirs | ours for title in titles[4:-1])
    assert theirs <= {flag for group in found.values() for flag in group} | {"local_rank"}
    assert {"hub_model_id", "push_to_hub"} <= set(found["the Hub"]) and "logging_steps" not in found["the Hub"]


def test_names_that_are_written_out_are_those_that_exist():
    """The page does not wait for the modules that define them."""
    helps = {each.name: each.metadata["help"] for each in fields(ModelArguments)}
    assert f"One of {', '.join(MODEL_SIZES)};" in helps["model_size"]
    assert f": {', '.join(SAMPLINGS)}, drawn" in helps["position_sampling"]


def test_sub_commands_stand_in_the_order_of_their_use(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hf-relpos", "--help"])
    main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    names = [line.split()[0] for line in lines]
    assert names == [*COMMANDS] and all(len(line) < 100 for line in lines)
    order = [names.index(name) for name in ("schemes", "train", "evaluate", "generate", "sweep", "report", "push")]
    assert order == sorted(order)


LIGHT = """
import contextlib, io, sys
names, sys.argv[0] = sys.argv[1:], "hf-relpos"
from hf_relpos.cli import main
for name in names:
    sys.argv = ["hf-relpos", name, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as page, contextlib.suppress(SystemExit):
        main()
    loaded = [each for each in ("torch", "transformers.modeling_utils", "datasets", "scipy") if each in sys.modules]
    print(name, page.getvalue().split()[0], *loaded)
"""


def test_a_page_waits_for_no_library_that_takes_seconds():
    """But that of training, whose flags are those of transformers; in a process of its own, where nothing is loaded."""
    names = [name for name in PAGES if name not in ("train", "finetune")]
    ran = subprocess.run([sys.executable, "-c", LIGHT, *names], capture_output=True, text=True, cwd=ROOT)
    assert ran.stdout.splitlines() == [f"{name} usage:" for name in names], ran.stdout + ran.stderr
