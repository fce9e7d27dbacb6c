"""Generation as a user runs it: a prompt, a file of prompts, and what bad input gets."""

import json

import pytest
from helpers import refusal
from transformers import pipeline

from hf_relpos.inference.generate import _read_prompts


def test_generation(trained, tmp_path, run_script, capsys):
    model = ["--model_name_or_path", trained / "rotary"]
    run_script("generate", *model, "--prompt", "the state", "--max_new_tokens", 8)
    streamed = capsys.readouterr().out.strip()
    assert streamed.startswith("the state") and len(streamed) > len("the state")
    (tmp_path / "prompts.txt").write_text("the state\n\na government of the people and\nwar\n")
    files = ["--prompt_file", tmp_path / "prompts.txt", "--output_file", tmp_path / "texts.jsonl"]
    run_script("generate", *model, *files, "--max_new_tokens", 8, "--batch_size", 2)
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["the state", "a government of the people and", "war"]
    assert rows[0]["prompt"] + rows[0]["text"].rstrip() == streamed, "batched with padding as alone"
    sampled = []
    for seed in (1, 1, 2):
        run_script("generate", *model, "--prompt", "", "--temperature", 1.5, "--top_p", 0.99, "--seed", seed)
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]
    run_script("generate", *model, "--prompt", "the state", "--max_new_tokens", 8, "--temperature", 0, "--top_p", 0.9)
    assert capsys.readouterr().out.strip() == streamed, "the likeliest tokens"


def test_a_line_of_prompts_ends_at_its_end_only(tmp_path):
    (tmp_path / "p.txt").write_text("one\u2028two\x0cthree\r\nfour\x85five\n\nsix", encoding="utf-8", newline="")
    assert _read_prompts(str(tmp_path / "p.txt")) == ["one\u2028two\x0cthree", "four\x85five", "six"]


def test_an_output_that_cannot_be_written_is_found_before_anything_is_generated(
    tmp_path, run_script, capsys, monkeypatch
):
    def deny(dir=None):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", deny)
    (tmp_path / "p.txt").write_text("the state")
    files = ["--prompt_file", tmp_path / "p.txt", "--output_file", tmp_path / "texts.jsonl"]
    line = refusal(run_script, capsys, "generate", ["--model_name_or_path", tmp_path / "no_model", *files])
    assert "Permission denied" in line and str(tmp_path) in line


def test_pipeline_on_what_training_saved(trained):
    generate = pipeline("text-generation", model=str(trained / "linear_cpb"))
    (output,) = generate("the state of", max_new_tokens=5, do_sample=False)
    assert output["generated_text"].startswith("the state of")


BAD_GENERATION = {
    "no prompt": ([], "exactly one of --prompt and --prompt_file"),
    "missing prompts": (["--prompt_file", "no.txt"], "`prompt_file` 'no.txt' does not exist"),
    "no tokens": (["--prompt", "the", "--max_new_tokens", 0], "`max_new_tokens` must be at least 1, got 0"),
    "past a learned table": (["--prompt", "the", "--max_new_tokens", 40], "`max_new_tokens` must be at most"),
    "sampling": (["--prompt", "the", "--max_new_tokens", 4, "--temperature", -1], "temperature"),
    "no output without prompts": (["--prompt", "the", "--output_file", "x"], "`output_file` 'x' must be new"),
}


@pytest.mark.parametrize("flags, message", BAD_GENERATION.values(), ids=BAD_GENERATION)
def test_generation_refuses(flags, message, trained, run_script, capsys):
    model = ["--model_name_or_path", trained / "learned"]
    assert message in refusal(run_script, capsys, "generate", [*model, *flags])
