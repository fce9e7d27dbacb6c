"""docs/clients.md: made from its record, in which nothing is broken; and how the matrix judges."""

import json

import pytest
import torch
from clients.harness import Refused, describe
from clients.page import BROKEN, LIMIT, REFUSED, WORKS, cell, make_page, verdict
from conftest import ROOT, make_model, make_tokens
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


RECORD = json.loads((ROOT / "docs" / "results" / "clients.json").read_text(encoding="utf-8"))
FAILED, DONE = {"outcome": "failed", "refused": False, "error": "E: no"}, {"outcome": "works"}


def test_the_page_is_made_from_the_record():
    assert (ROOT / "docs" / "clients.md").read_text(encoding="utf-8") == make_page(RECORD)


def test_nothing_is_broken():
    verdicts = {
        (name, model, use): verdict(row, model, use)
        for name, row in RECORD["clients"].items()
        for model, uses in row["models"].items()
        for use in uses
    }
    assert len(verdicts) > 300 and not [place for place, said in verdicts.items() if said == BROKEN]


def test_a_failure_is_the_clients_where_llama_fails_too():
    row = {"models": {"Llama": {"a": DONE, "b": FAILED, "c": DONE}}}
    row["models"]["alibi"] = {"a": FAILED, "b": FAILED, "c": FAILED | {"refused": True}}
    assert [verdict(row, "Llama", use) for use in "abc"] == [WORKS, LIMIT, WORKS]
    assert [verdict(row, "alibi", use) for use in "abc"] == [BROKEN, LIMIT, REFUSED]
    row["models"]["alibi"]["a"] = DONE
    assert cell(row, "alibi") == f"1 {LIMIT}, 1 {REFUSED}, 1 {WORKS}" and cell(row, "fox") == "–"


def test_a_refusal_is_a_line_of_the_models():
    with pytest.raises(ValueError) as ours:
        make_model("learned", max_position_embeddings=8)(make_tokens(1, 9))
    assert describe(ours.value) == {"refused": True, "error": str(ours.value)}
    wrapped = RuntimeError("the client failed")
    wrapped.__cause__ = ours.value
    assert describe(wrapped)["refused"] and describe(Refused("no"))["refused"]
    assert describe(KeyError("x")) == {"refused": False, "error": "KeyError: 'x'"}
    assert not describe(ValueError("from elsewhere"))["refused"]


def test_the_attention_function_may_lay_heads_end_to_end(monkeypatch):
    """vLLM's returns (B, Q, H · D), transformers' (B, Q, H, D)."""
    model, tokens = make_model("rotary"), make_tokens(2, 9)
    expected = model(tokens).logits

    def end_to_end(*arguments, **options):
        output, weights = sdpa_attention_forward(*arguments, **options)
        return output.flatten(2), weights

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", end_to_end)
    assert torch.equal(model(tokens).logits, expected)
