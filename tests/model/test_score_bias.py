"""A bias for each score is computed for a few queries at a time: the same result, in less memory."""

import pytest
import torch
from conftest import make_model, make_tokens
from torch.autograd.graph import saved_tensors_hooks
from torch.testing import assert_close
from transformers import DynamicCache

from hf_relpos.model import attention_score_bias
from hf_relpos.model.decoder_layer import RelPosAttention


CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 logits of magnitude 1..10, computed in another order
LENGTH = 45
SCHEMES = ["cope", "dape", "alibi+dape", "dape+fox", "fire", "fox/cope", "linear_cpb"]


@pytest.fixture(params=[1, 6 * 2 * 50 * 7], ids=["a query at a time", "some queries at a time"])
def few(request, monkeypatch):
    """→ a function that sets the number of scores at a time: few, or all."""

    def set_few(is_few: bool) -> None:
        for name in ("CACHED_SCORES", "CHUNK_SCORES"):
            monkeypatch.setattr(attention_score_bias, name, request.param if is_few else 2**40)

    return set_few


def padded():
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :9] = 0
    return {"attention_mask": mask}


def packed():
    return {"position_ids": torch.cat((torch.arange(20), torch.arange(LENGTH - 20)))[None].expand(2, -1)}


def with_gaps():
    return {"position_ids": (torch.arange(LENGTH) * 2)[None]}


def with_a_prefix():
    """The first ten tokens see each other, also later ones."""
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    mask[:10, :10] = True
    return {"attention_mask": mask[None, None].expand(2, 1, -1, -1)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("inputs", [dict, padded, packed, with_gaps, with_a_prefix])
def test_the_result_and_its_gradients_are_the_same(scheme, inputs, few):
    model, tokens, inputs = make_model(scheme, num_key_value_heads=2), make_tokens(2, LENGTH), inputs()
    real = inputs["attention_mask"].bool() if inputs.get("attention_mask", torch.ones(1)).ndim == 2 else ...
    found = []
    for is_few in (False, True):
        few(is_few)
        model.zero_grad()
        logits = model(tokens, **inputs).logits[real]
        logits.square().mean().backward()
        with torch.no_grad():
            without = model(tokens, **inputs).logits[real]
        found.append((logits.detach(), without, [p.grad for p in model.parameters()]))
    (expected, _, gradients), (*few_logits, few_gradients) = found
    for logits in few_logits:
        assert_close(logits, expected, **CLOSE)
    least = 1e-5 * max(gradient.norm() for gradient in gradients)  # where the terms of a number's gradient cancel
    for (name, _), ours, theirs in zip(model.named_parameters(), few_gradients, gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-4 * max(theirs.norm(), least), name


@pytest.mark.parametrize("scheme", ["cope", "dape", "fire"])
@pytest.mark.parametrize("window", [None, 6])
def test_beside_a_cache_and_a_window(scheme, window, few):
    layers = {} if window is None else {"sliding_window": window, "layer_types": ["sliding_attention"] * 2}
    model, tokens, inputs = make_model(scheme, **layers), make_tokens(2, LENGTH), padded()
    real = inputs["attention_mask"].bool()
    few(False)
    with torch.no_grad():
        expected = model(tokens, **inputs).logits
        few(True)
        past, pieces = DynamicCache(config=model.config), []
        for start, stop in ((0, 21), (21, 22), (22, LENGTH)):
            mask = inputs["attention_mask"][:, :stop]
            pieces.append(model(tokens[:, start:stop], attention_mask=mask, past_key_values=past).logits)
    assert_close(torch.cat(pieces, dim=1)[real], expected[real], **CLOSE)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_no_layer_holds_the_scores_of_all_queries(has_gradients, monkeypatch):
    """Neither for the result nor for the gradients; keys after the last query of a chunk are left out."""
    seen, score_bias = [], RelPosAttention.score_bias

    def look(self, query, key, bias, positions):
        seen.append((query.shape[2], key.shape[2]))
        return score_bias(self, query, key, bias, positions)

    monkeypatch.setattr(RelPosAttention, "score_bias", look)
    monkeypatch.setattr(attention_score_bias, "CHUNK_SCORES" if has_gradients else "CACHED_SCORES", 6 * 45 * 10)
    model = make_model("dape", num_hidden_layers=1)
    kept = []
    with torch.set_grad_enabled(has_gradients), saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        model(make_tokens(1, LENGTH))
    assert seen == [(10, 10), (10, 20), (10, 30), (10, 40), (5, 45)]
    assert bool(kept) == has_gradients and max(kept, default=0) < 6 * 45 * 45
