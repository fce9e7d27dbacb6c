"""The script that measures schemes on a pretrained model, on a tiny one: measured once, gone on with, told."""

import json
import math

import pytest
from conftest import load_script, make_tokenizer
from helpers import refusal
from transformers import AutoModelForCausalLM, LlamaConfig


@pytest.fixture
def llama(tmp_path):
    sizes = dict(vocab_size=300, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, max_position_embeddings=64, initializer_range=0.3))
    model.save_pretrained(tmp_path / "llama")
    make_tokenizer().save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def flags_of(llama, folder, data_flags, *variants):
    flags = dict(model=llama, output_dir=folder, device="cpu", dtype="float32", steps=2, block_size=32, lora_rank=2)
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    lengths = ["--text_lengths", 64, 128, "--passkey_lengths", 400, "--needle_lengths", 1500]
    return [*words, *lengths, *data_flags, "--variants", *variants]


def test_what_was_measured_is_kept_and_told(llama, data_flags, tmp_path, run_script, monkeypatch):
    pytest.importorskip("peft")
    folder, page = tmp_path / "out", tmp_path / "page.md"
    names = ["as it is", "dynamic 2", "PI 4"]
    run_script("pretrained_evidence", *flags_of(llama, folder, data_flags, *names))
    before = {path: path.stat().st_mtime_ns for path in folder.glob("items/*/*.json")}
    assert len(before) == 3 * 5
    names += ["DroPE", "DroPE + temperature"]
    page.write_text("# Page\n\n<!-- tables: made by scripts/pretrained_evidence.py -->\nold\n<!-- end -->\nrest\n")
    run_script("pretrained_evidence", *flags_of(llama, folder, data_flags, *names), "--page", page)
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    variants = json.loads((folder / "evidence.json").read_text())["variants"]
    assert [*variants] == names and (folder / "evidence.png").stat().st_size > 1000
    for found in variants.values():
        assert [*found] == [
            "text",
            "passkey_text 400",
            *(f"{task} 1500" for task in load_script("pretrained_evidence").NEEDLES),
        ]
        assert found["text"]["loss"].keys() == {"64", "128"} and found["text"]["num_windows"] == 1
        assert len(found["passkey_text 400"]["kinds"]) == 5
    short, long = (
        {name: found["text"]["loss"][length] for name, found in variants.items()} for length in ("64", "128")
    )
    # what acts past the length of pretraining only, though the blocks of LoRA were shorter
    for first, second in (("as it is", "dynamic 2"), ("DroPE", "DroPE + temperature")):
        assert short[first] == short[second] and long[first] != long[second]
    assert len({*short.values()}) == 3 and len({*long.values()}) == 5
    assert json.loads((folder / "models" / "drope" / "training.json").read_text())["flags"]["lora_rank"] == 2
    text = page.read_text()
    row = f"| PI 4 | {math.exp(variants['PI 4']['text']['loss']['64']):.1f} |"
    assert row in text and "old" not in text and text.endswith("<!-- end -->\nrest\n")


def test_an_unknown_variant_is_refused(llama, data_flags, tmp_path, run_script, capsys):
    line = refusal(run_script, capsys, "pretrained_evidence", flags_of(llama, tmp_path / "x", data_flags, "NTK"))
    assert "`variants` must be some of ['as it is'" in line and "got 'NTK'" in line
