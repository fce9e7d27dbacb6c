"""Loading a saved model: it needs no library for data or plots, and a spoilt folder is refused everywhere."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, save_with_tokenizer
from helpers import ending, finetuning_flags, installed, refusal, words_of
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from hf_relpos.model_loading import edited_fields


LOAD = """
import sys
from transformers import PreTrainedModel

HEAVY = {"datasets", "pyarrow", "scipy", "matplotlib", "pandas", "evaluate", "gradio"}
before = HEAVY & set(sys.modules)  # transformers itself imports scipy where it is installed
from hf_relpos import RelPosForCausalLM
from hf_relpos.model_loading import load_model, load_model_tokenizer

model = load_model(sys.argv[1], RelPosForCausalLM)
load_model_tokenizer(sys.argv[1], model)
print(sorted(HEAVY & set(sys.modules) - before), "scipy.stats" in sys.modules)
"""


def test_loading_a_model_imports_no_library_of_data_or_plots(tmp_path):
    save_with_tokenizer(tmp_path, "alibi")
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[] False", done.stderr


def copy_of(model, folder):
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


def other_scheme(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pos_embedding_type": "alibi"}))


def another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))


def truncated_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def larger_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def no_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


SPOILT = {
    "weights of another scheme": (other_scheme, "holds other weights than its configuration says"),
    "another width": (another_width, "has the shape (300, 32) in the file and (300, 64) by config.json"),
    "truncated weights": (truncated_weights, "cannot be loaded"),
    "a larger tokenizer": (larger_tokenizer, "`vocab_size` of the model is 300, but the tokenizer has 301 entries"),
    "no tokenizer": (no_tokenizer, "no tokenizer in "),
}


@pytest.mark.parametrize("spoil, message", SPOILT.values(), ids=SPOILT)
def test_a_spoilt_model_is_refused_everywhere(spoil, message, trained, data_flags, tmp_path, run_script, capsys):
    spoil(copy_of(trained / "linear_cpb", tmp_path / "spoilt"))
    model = ["--model_name_or_path", tmp_path / "spoilt"]
    flags = finetuning_flags(data_flags, tmp_path / "spoilt", tmp_path / "x")
    assert message in refusal(run_script, capsys, "generate", [*model, "--prompt", "the"])
    assert message in refusal(run_script, capsys, "evaluate", [*model, "--output_dir", tmp_path / "x", *data_flags])
    assert message in refusal(run_script, capsys, "finetune", flags)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("program", installed("generate", "evaluate", "finetune", "push", "serve", "demo"))
@pytest.mark.parametrize(
    "weight, value",
    [
        ("model.embed_tokens.weight", float("nan")),  # of a token that may not occur
        ("model.layers.0.self_attn.position_embeddings.linear_cpb.mlp.0.bias", float("inf")),
        ("model.norm.weight", float("-inf")),
    ],
)
def test_weights_that_are_not_finite_are_used_nowhere(
    program, weight, value, trained, data_flags, tmp_path, monkeypatch, capsys
):
    folder = copy_of(trained / "linear_cpb", tmp_path / "spoilt")
    weights = load_file(folder / "model.safetensors")
    weights[weight].view(-1)[0] = value
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = ending(monkeypatch, capsys, program, *words_of(program, folder, data_flags, tmp_path / "x"))
    assert "the weights are not finite" in line and weight in line
    assert not (tmp_path / "x").exists()


# --- a configuration that was edited


EDITS = {
    "another scheme": (
        {"pos_embedding_type": "none", "rope_parameters": None},
        "pos_embedding_type",
        "'none'",
        "'rotary'",
    ),
    "another base": ({"rope_parameters": {"rope_theta": 500.0}}, "rope_parameters", "500.0", "10000.0"),
    "a window": ({"sliding_window": 16}, "sliding_window", "16", "None"),
}


def edit(folder, fields):
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )


@pytest.mark.parametrize("fields, name, after, before", EDITS.values(), ids=EDITS)
def test_an_edited_scheme_is_not_published(fields, name, after, before, trained, tmp_path, run_script, capsys):
    folder = copy_of(trained / "rotary", tmp_path / "model")
    assert edited_fields(folder) == {}
    edit(folder, fields)
    flags = ["--dry_run", "true", "--output_dir", tmp_path / "out"]
    line = refusal(run_script, capsys, "push_to_hub", [folder, "alice/m", *flags])
    found = re.search(rf"`{name}` is (.*?) in config.json and (.*?) in training.json", line)
    assert after in found[1] and before in found[2] and not (tmp_path / "out").exists()


def test_an_edited_scheme_is_said_once_and_not_compared(trained, data_flags, tmp_path, run_script, caplog, capsys):
    folder = copy_of(trained / "rotary", tmp_path / "model")
    edit(folder, EDITS["another scheme"][0])
    model = ["--model_name_or_path", folder]

    def warned():
        lines = [record.getMessage() for record in caplog.records if "training.json" in record.getMessage()]
        caplog.clear()
        return lines

    run_script("generate", *model, "--prompt", "the", "--max_new_tokens", 2)
    (line,) = warned()
    assert "`pos_embedding_type` is 'none' in config.json and 'rotary' in training.json" in line and "\n" not in line
    for name, path in (("edited", folder), ("whole", trained / "rotary")):
        flags = ["--eval_lengths", 32, 64, "--max_windows", 2, "--output_dir", tmp_path / name]
        run_script("evaluate", "--model_name_or_path", path, *data_flags, *flags)
        assert len(warned()) == (name == "edited")
    assert "none edited after training (42)" in capsys.readouterr().out
    results = [tmp_path / name / "results.json" for name in ("edited", "whole")]
    line = refusal(run_script, capsys, "report", ["--results", *results, "--output_dir", tmp_path / "report"])
    assert "is of no trained scheme: its `pos_embedding_type` is 'none' in config.json, 'rotary' where" in line
    run_script("finetune", *finetuning_flags(data_flags, folder, tmp_path / "tuned"))
    record = json.loads((tmp_path / "tuned" / "training.json").read_text())
    assert len(warned()) == 1 and record["pos_embedding_type"] == "none" and record["history"] == []
    assert record["base_edits"]["pos_embedding_type"] == ["rotary", "none"] and edited_fields(tmp_path / "tuned") == {}
    card = (tmp_path / "tuned" / "README.md").read_text()
    assert "Changed by hand before that, in its config.json: pos_embedding_type from 'rotary' to 'none'" in card
