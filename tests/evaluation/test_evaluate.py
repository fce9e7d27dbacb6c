"""Evaluation as a user runs it: result, table and plots, and what bad input gets."""

import json
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
from helpers import refusal
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_relpos.evaluation.evaluate import default_lengths
from hf_relpos.results.groups import setting_label
from hf_relpos.results.result_file import CONTEXT_NOTE, REQUIRED_KEYS, labels, ratio_notes


def test_evaluation_writes_a_result_a_table_and_plots(trained, data_flags, tmp_path, run_script, capsys):
    flags = ["--model_name_or_path", trained / "linear_cpb", "--output_dir", tmp_path / "eval", *data_flags]
    run_script("evaluate", *flags, "--eval_lengths", 32, 64, 128, "--stride", 16)
    result = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert set(REQUIRED_KEYS) <= set(result)
    assert (result["pos_embedding_type"], result["seed"], result["train_length"]) == ("linear_cpb", 42, 32)
    assert set(result["lengths"]["64"]) == {"loss", "perplexity", "median_loss", "num_tokens"}
    assert len({row["num_tokens"] for row in result["lengths"].values()}) == 1
    assert len(result["loss_by_position"]) == 128 and result["slope"]["slope"] is not None
    assert set(result["sliding_window"]) == {"32", "64", "128"}
    assert result["corpus"]["name"] == "train+valid.txt" and str(tmp_path) not in json.dumps(result)
    read = {"num_files": 13, "num_documents": {"train": 12, "validation": 1}}
    assert result["corpus"]["read"] == result["training"]["corpus"]["read"] == read
    for plot in ("loss_by_position.png", "perplexity_by_length.png"):
        assert (tmp_path / "eval" / plot).read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert CONTEXT_NOTE in printed
    assert "| linear_cpb (42) |" in printed and "sliding window of 64 by 16: perplexity" in printed
    assert labels([result, result | {"seed": 7}, result | {"model": "other"}]) == [
        "linear_cpb (42), linear_cpb",
        "linear_cpb (7)",
        "linear_cpb (42), other",
    ]

    run_script("evaluate", *[trained / "rotary" if f == trained / "linear_cpb" else f for f in flags[:3]],
               tmp_path / "eval2", *data_flags, "--eval_lengths", 32, 64, 128)  # fmt: skip
    results = [tmp_path / "eval" / "results.json", tmp_path / "eval2" / "results.json"]
    run_script("report", "--results", *results, "--output_dir", tmp_path / "report")
    table = (tmp_path / "report" / "table.md").read_text()
    assert (
        "linear_cpb (42)" in table
        and "rotary (42)" in table
        and f"{result['lengths']['64']['perplexity']:.2f}" in table
    )


def test_the_card_knows_the_evaluations_in_its_folder(trained, data_flags, tmp_path, run_script, capsys):
    shutil.copytree(trained / "rotary", tmp_path / "model")
    flags = ["--model_name_or_path", tmp_path / "model", *data_flags, "--eval_lengths", 32, 64, "--max_windows", 2]
    card = tmp_path / "model" / "README.md"
    before = card.read_text()
    assert "No evaluation lies in its folder" in before and "not been evaluated" not in before
    assert "(files stand here without\ntheir folders: put in where yours lie)" in before
    run_script("evaluate", *flags, "--output_dir", tmp_path / "elsewhere")
    assert card.read_text() == before
    run_script("evaluate", *flags, "--output_dir", tmp_path / "model" / "evaluation")
    assert (
        "No evaluation lies" not in card.read_text() and "## Loss by length: the validation split" in card.read_text()
    )
    assert str(tmp_path) not in card.read_text()
    prompt = shlex.split(capsys.readouterr().err.splitlines()[-1])[-1]
    assert prompt and prompt == json.loads((tmp_path / "model" / "training.json").read_text())["corpus"]["opening"]
    card.write_text("mine")
    run_script("evaluate", *flags, "--output_dir", tmp_path / "model" / "again")
    assert card.read_text() == "mine"


def test_evaluation_of_another_family(tmp_path, trained, data_flags, run_script):
    sizes = dict(vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "llama")
    AutoTokenizer.from_pretrained(trained / "none").save_pretrained(tmp_path / "llama")
    flags = ["--model_name_or_path", tmp_path / "llama", "--output_dir", tmp_path / "eval", *data_flags]
    run_script("evaluate", *flags, "--eval_lengths", 32, 128, "--train_length", 32)
    result = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert result["pos_embedding_type"] is None and result["model"] == "llama" and result["slope"]


@pytest.mark.parametrize(
    "train_length, limit, lengths",
    [
        (None, None, [128, 256, 512, 1024]),
        (512, None, [128, 256, 512, 1024]),
        (32, None, [32, 64, 128, 256]),
        (128, 300, [128, 256]),
        (32, 32, [32]),
        (None, 100, [100]),
    ],
)
def test_lengths_that_are_not_named(train_length, limit, lengths):
    assert default_lengths(train_length, SimpleNamespace(max_positions=limit)) == lengths


def test_lengths_that_are_not_named_are_those_that_documents_and_a_table_have(trained, tmp_path, run_script, capsys):
    """The documents have some 100 tokens, the learned table 32 rows; the record says which lengths it was."""
    (tmp_path / "short.txt").write_text("<|endoftext|>".join(["the state of union and people in war " * 20] * 3))
    for name, lengths in (("rotary", [32, 64, 128]), ("learned", [32])):
        flags = ["--model_name_or_path", trained / name, "--validation_file", tmp_path / "short.txt"]
        run_script("evaluate", *flags, "--output_dir", tmp_path / name)
        result = json.loads((tmp_path / name / "results.json").read_text())
        assert [*map(int, result["lengths"])] == result["flags"]["eval_lengths"] == lengths
        printed = capsys.readouterr()
        assert re.search(rf"Read: \d+ windows of {lengths[-1]} tokens from 3 documents, at 32.* tokens\.", printed.out)
        opening = json.loads((trained / name / "training.json").read_text())["corpus"]["opening"]
        expected = f"next: hf-relpos generate --model_name_or_path {trained / name} --prompt {shlex.quote(opening)}"
        assert printed.err.splitlines()[-1] == expected


BAD_EVALUATION = {
    "length of 0": (["--eval_lengths", 0, 64], "`eval_lengths` must be at least 2"),
    "past a learned table": (["--eval_lengths", 32, 64], "`eval_lengths` must be at most 32"),
    "no such split": (
        ["--eval_lengths", 32, "--eval_split", "dev"],
        "`eval_split` must be one of ['train', 'validation'], got 'dev'",
    ),
    "stride": (["--eval_lengths", 16, 32, "--stride", 32], "`stride` must lie between 1 and"),
    "no windows": (["--eval_lengths", 32, "--max_windows", 0], "`max_windows` must be at least 1, got 0"),
    "abbreviation": (["--conf", "no.yaml"], "unknown flag: '--conf'"),
    "two configurations": (["--config", "a.yaml", "--config", "b.yaml"], "--config takes one file, once"),
    "dtype": (["--dtype", "int8"], "`dtype` must be float32"),
    "missing file": (
        ["--eval_lengths", 32, "--validation_file", "no.txt"],
        "`validation_file` 'no.txt' does not exist",
    ),
}


@pytest.mark.parametrize("flags, message", BAD_EVALUATION.values(), ids=BAD_EVALUATION)
def test_evaluation_refuses(flags, message, trained, data_flags, tmp_path, run_script, capsys):
    common = ["--model_name_or_path", trained / "learned", "--output_dir", tmp_path / "x", *data_flags]
    assert message in refusal(run_script, capsys, "evaluate", [*common, *flags])
    assert not (tmp_path / "x").exists()


def test_a_row_says_what_is_scaled_and_a_missing_ratio_why():
    training = {
        "pos_embedding_type": "rotary",
        "pos_embedding_kwargs": {},
        "rope_parameters": {"rope_type": "yarn", "factor": 4, "rope_theta": 10000.0},
    }
    result = {"pos_embedding_type": "rotary", "seed": 7, "corpus": {}, "training": training, "train_length": 512}
    assert setting_label(result) == "rotary rope_type=yarn, factor=4 (7)"
    assert setting_label({**result, "training": {**training, "rope_parameters": None}}) == "rotary (7)"
    assert setting_label({**result, "training": None}) == "rotary (7)"
    cells = {str(length): {"perplexity": 2.0} for length in (128, 512)}
    (note,) = ratio_notes([{**result, "lengths": cells}])
    assert (
        "ratio –" in note
        and "which is 512: --eval_lengths of `hf-relpos evaluate` must hold it and a longer one" in note
    )
    (note,) = ratio_notes([{**result, "lengths": cells, "train_length": None}])
    assert "not known (--train_length of" in note
    assert ratio_notes([{**result, "lengths": cells, "train_length": 128}]) == []
