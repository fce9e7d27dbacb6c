"""The ways of `generate` beyond greedy decoding and beams: each ends in the tokens that the plain forward gives."""

import copy

import pytest
import torch
from conftest import SCHEMES, make_model, make_tokens
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close
from transformers import DynamicCache, QuantizedCache, StaticCache

from hf_relpos.model.kept_tables import _TABLES
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS


CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 logits of magnitude 1..10, computed in another order
KINDS = ["none", "learned", "alibi", "linear_cpb", "fire", "fox", "cope", "dape", "rotary"]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ahead", ["assistant", "prompt lookup"])
def test_speculative_decoding_is_greedy(scheme, ahead):
    """Several tokens a step, of which some are taken back: the cache is cropped."""
    model, tokens = make_model(scheme), make_tokens(1, 8).repeat(1, 3)
    expected = model.generate(tokens, **GREEDY)
    if ahead == "assistant":
        assistant = make_model(scheme, num_hidden_layers=scheme.count("/") + 1)
        options = {"assistant_model": assistant, "num_assistant_tokens": 4}
    else:
        options = {"prompt_lookup_num_tokens": 4}
    assert torch.equal(model.generate(tokens, **GREEDY, **options), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_generation_goes_on_from_a_cache(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 9)
    expected = model.generate(tokens, **GREEDY)
    past = DynamicCache()
    model(tokens[:, :5], past_key_values=past)
    options = {**GREEDY, "past_key_values": past, "max_new_tokens": 6, "min_new_tokens": 6}
    first = model.generate(tokens, **options)
    again = model.generate(first, attention_mask=torch.ones_like(first), **options)  # a padding token may be generated
    assert torch.equal(again, expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_sampling_is_the_same_with_and_without_a_cache(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 9)
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        options = {**GREEDY, "do_sample": True, "top_k": 9, "num_return_sequences": 2}
        sampled.append(model.generate(tokens, use_cache=use_cache, **options))
    assert torch.equal(*sampled) and not torch.equal(sampled[0][0], sampled[0][1])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_to_keep(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 9)
    whole = model(tokens).logits
    assert_close(model(tokens, logits_to_keep=3).logits, whole[:, -3:], **CLOSE)
    assert_close(model(tokens, logits_to_keep=torch.tensor([1, 7])).logits, whole[:, [1, 7]], **CLOSE)


@pytest.mark.parametrize("scheme", KINDS)
def test_a_compiled_decode_step_with_a_static_cache(scheme):
    """One graph, without breaks and without recompilation from token to token, with left padding. A table of the
    distances is computed once, and again when the parameters change."""
    torch._dynamo.reset()
    model = make_model(scheme)
    tokens, mask, tables = make_tokens(2, 14), torch.ones(2, 20, dtype=torch.long), []
    mask[1, :4] = 0
    expected = model(tokens, attention_mask=mask[:, :14]).logits
    past = StaticCache(config=model.config, max_cache_len=20)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        model(tokens[:, :8], attention_mask=mask[:, :8], past_key_values=past)
        for index in range(8, 14):
            if index == 12:  # as an adapter is merged; keys and values are then those of both
                for name, parameter in model.named_parameters():
                    parameter.data *= 1.5 if "position_embeddings" in name else 1.0
                eager, static = make_model(scheme), copy.deepcopy(past)
                eager.load_state_dict(model.state_dict())
            # as `generate` hands it over: a ready mask over the whole cache, and positions
            visible = torch.arange(20) <= index
            ready = (visible & mask.bool())[:, None, None, :]
            position_ids = mask[:, : index + 1].sum(-1, keepdim=True) - 1
            given = {"attention_mask": ready, "position_ids": position_ids}
            step = compiled(tokens[:, index : index + 1], past_key_values=past, **given).logits
            if index >= 12:
                expected[:, index] = eager(tokens[:, index : index + 1], past_key_values=static, **given).logits[:, 0]
            assert_close(step[:, 0], expected[:, index], **CLOSE)
            tables.append([_TABLES[each][1] for each in model.modules() if each in _TABLES])
    assert counter.frame_count == 1
    assert bool(tables[0]) == (scheme in ("alibi", "linear_cpb", "dape"))
    for first, second, last, changed in zip(tables[0], tables[1], tables[3], tables[5]):
        assert first is second is last and (changed is last) == (scheme == "alibi")


@pytest.mark.parametrize("scheme", KINDS)
def test_static_cache_of_generate_with_its_compiler(scheme):
    model, tokens = make_model(scheme), make_tokens(2, 9)
    compiled = model.generate(tokens, cache_implementation="static", **GREEDY)
    assert torch.equal(compiled, model.generate(tokens, **GREEDY))


@pytest.mark.parametrize("scheme", KINDS)
def test_quantised_cache(scheme):
    """The error is the quantisation's alone: with 4 bits, whose steps are a fifth as wide, far less than with 2."""
    pytest.importorskip("optimum.quanto", reason="keeps the quantised keys and values")
    model, tokens = make_model(scheme, head_dim=16), make_tokens(2, 40)
    expected, errors = model(tokens).logits[:, 30:], []
    for nbits in (2, 4):
        options = {"nbits": nbits, "q_group_size": 16, "residual_length": 4, "axis_key": 0, "axis_value": 0}
        past = QuantizedCache("quanto", model.config, **options)
        model(tokens[:, :30], past_key_values=past)
        steps = [model(tokens[:, index : index + 1], past_key_values=past).logits for index in range(30, 40)]
        errors.append((torch.cat(steps, dim=1) - expected).norm() / expected.norm())
    assert 0 < errors[1] < 0.4 * errors[0]


def test_every_kind_of_scheme_is_here():
    assert {POSITION_EMBEDDINGS[scheme].kind for scheme in KINDS} == {"none", "absolute", "relative"}
