"""What the steps of a generation share is never stale: whatever changes between two of them, a step says what it says by a
cache that nothing was kept with, and what a dense bias says."""

import copy

import pytest
import torch
from conftest import make_model, make_tokens
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

from hf_relpos.model.kept_steps import _KEPT
from hf_relpos.model.scheme_base import POSITION_EMBEDDINGS, StartGate


CLOSE = {"rtol": 1e-4, "atol": 2e-5}
KINDS = ["none", "rotary", "alibi", "linear_cpb", "fire", "rotary+log_cpb", "fox/alibi", "linear_cpb/log_cpb"]
TABLES = ["linear_cpb", "t5", "rotary+log_cpb"]


def begin(scheme, rows=2, **overrides):
    """→ a model, its cache after some steps, which keep what they share, and tokens that come next."""
    model, tokens = make_model(scheme, **overrides), make_tokens(rows, 24)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        model(tokens[:, :8], past_key_values=past)
        for index in range(8, 12):
            model(tokens[:, index : index + 1], past_key_values=past)
    assert past in _KEPT
    return model, past, tokens[:, 12:]


@torch.no_grad()
def check(model, past, token, **given):
    """One step, which must be that of a copy of the cache, with which nothing is kept, and that of the eager reference."""
    fresh, dense = copy.deepcopy(past), copy.deepcopy(past)
    assert fresh not in _KEPT
    step = model(token, past_key_values=past, **given).logits
    assert torch.equal(step, model(token, past_key_values=fresh, **given).logits)
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    expected = model(token, past_key_values=dense, **given).logits
    model.set_attn_implementation(implementation)
    assert_close(step, expected, **CLOSE)
    return step


@pytest.mark.parametrize("scheme", KINDS)
def test_steps_are_the_whole_forward(scheme):
    model, tokens = make_model(scheme), make_tokens(1, 70)
    past = DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(tokens).logits
        model(tokens[:, :55], past_key_values=past)
        steps = [model(tokens[:, index : index + 1], past_key_values=past).logits for index in range(55, 70)]
    assert_close(torch.cat(steps, dim=1), expected[:, 55:], **CLOSE)


# --- parameters


def of_schemes(model):
    return [parameter for name, parameter in model.named_parameters() if "position_embeddings" in name]


def in_place(model):
    for parameter in of_schemes(model):
        parameter.mul_(1.7)


def behind_the_version_counter(model):
    """As an adapter is merged."""
    for parameter in of_schemes(model):
        parameter.data *= 1.7


def new_data(model):
    for parameter in of_schemes(model):
        parameter.data = parameter.data * 1.7


def new_parameters(model):
    for module in model.modules():
        for name, parameter in [*module._parameters.items()]:
            if any(parameter is each for each in of_schemes(model)):
                setattr(module, name, torch.nn.Parameter(parameter * 1.7))


def loaded(model):
    model.load_state_dict({name: value * 1.3 for name, value in model.state_dict().items()})


def loaded_in_their_place(model):
    state = {name: value * 1.3 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def trained(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with torch.enable_grad():
        tokens = make_tokens(1, 9)
        model(tokens, labels=tokens).loss.backward()
    optimizer.step()


def rounded(model):
    model.to(torch.bfloat16).to(torch.float32)


def another_module(model):
    for layer in [model.model, *(layer.self_attn for layer in model.model.layers)]:
        for name, scheme in layer.position_embeddings.items():
            layer.position_embeddings[name] = copy.deepcopy(scheme)
    in_place(model)


def gates(model):
    for holder in [model.model, *(layer.self_attn for layer in model.model.layers)]:
        for scheme in holder.position_embeddings.values():
            if StartGate.fits(type(scheme)):
                scheme.start_gate = StartGate(model.config.num_attention_heads)
                scheme.start_gate.weight.fill_(0.4)


def attributes(model):
    """Which no parameter shows: the buckets of T5, the base of a rotation."""
    for holder in [model.model, *(layer.self_attn for layer in model.model.layers)]:
        for name, scheme in holder.position_embeddings.items():
            if name == "t5":
                scheme.bucket_starts = [2 * start for start in scheme.bucket_starts]
            elif name == "rotary":
                scheme.rope_theta = 7.0
            else:
                scheme.features = lambda distance: distance[:, None].float() ** 0.5


CHANGES = [in_place, behind_the_version_counter, new_data, new_parameters, loaded, loaded_in_their_place, trained]
CHANGES += [rounded, another_module, gates, attributes]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("scheme", TABLES)
def test_changed_parameters(scheme, change):
    model, past, tokens = begin(scheme)
    untouched = copy.deepcopy(past)
    with torch.no_grad():
        before = model(tokens[:, :1], past_key_values=untouched).logits
        change(model)
    step = check(model, past, tokens[:, :1])
    assert not torch.allclose(step, before, rtol=1e-3, atol=1e-3)
    check(model, past, tokens[:, 1:2])


# --- the cache


def reordered(past):
    past.reorder_cache(torch.tensor([1, 0, 0]))
    return 3


def split(past):
    past.batch_select_indices(torch.tensor([2]))
    return 1


def repeated(past):
    past.batch_repeat_interleave(2)
    return 6


def cropped(past):
    past.crop(-5)
    return 3


CACHES = {change.__name__: change for change in (reordered, split, repeated, cropped)}


@pytest.mark.parametrize("change", CACHES)
@pytest.mark.parametrize("scheme", KINDS)
def test_changed_caches(scheme, change):
    if change == "cropped" and scheme == "linear_cpb/log_cpb":
        pytest.skip("keys that left the window are gone, for any model")
    model, past, tokens = begin(scheme, rows=3)
    rows = CACHES[change](past)
    for index in range(3):
        check(model, past, tokens[:1, index : index + 1].expand(rows, -1))


@pytest.mark.parametrize("scheme", KINDS)
def test_what_a_step_is_given_besides(scheme):
    """Positions, padding, several tokens, another kernel or precision, gradients, between steps with nothing of these."""
    model, past, tokens = begin(scheme)
    length, token = 12, tokens[:, :1]
    for shift in (0, 400):
        check(model, past, token, position_ids=torch.tensor([[length + shift]]))
        check(model, past, token, position_ids=torch.tensor([[length + 1 + shift], [length + 1 + shift]]))
        length += 2
    check(model, past, token)
    mask = torch.ones(2, length + 2, dtype=torch.long)
    check(model, past, token, attention_mask=mask)
    for hidden in ((0, slice(0, 3)), (1, slice(5, 7))):
        mask = torch.cat((mask, mask[:, :1] * 0 + 1), dim=1)
        mask[hidden] = 0
        check(model, past, token, attention_mask=mask)
    check(model, past, token)
    check(model, past, tokens[:, :3])
    check(model, past, token)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            fresh = model(token, past_key_values=copy.deepcopy(past)).logits
            assert torch.equal(model(token, past_key_values=past).logits, fresh)
    check(model, past, token)
    twin = copy.deepcopy(past)
    with_gradients = model(token, past_key_values=copy.deepcopy(past)).logits
    with torch.inference_mode():
        assert_close(model(token, past_key_values=past).logits, with_gradients, **CLOSE)
    model(token, past_key_values=twin)
    with_gradients = model(token, past_key_values=twin).logits
    with torch.no_grad():
        assert_close(model(token, past_key_values=past).logits, with_gradients, **CLOSE)


@pytest.mark.parametrize("scheme", ["rotary", "alibi", "linear_cpb"])
def test_another_dtype(scheme):
    model, past, tokens = begin(scheme)
    model.double()
    for layer in past.layers:
        layer.keys, layer.values = layer.keys.double(), layer.values.double()
    check(model, past, tokens[:, :1])


@pytest.mark.parametrize("scheme", ["rotary", "linear_cpb"])
def test_two_models_on_one_cache(scheme):
    model, past, tokens = begin(scheme)
    other = make_model(scheme)
    loaded(other)
    for index in range(4):
        check((other, model)[index % 2], past, tokens[:, index : index + 1])
    model.model.layers = model.model.layers[:1]
    check(model, past, tokens[:, 4:5])


@pytest.mark.parametrize("scheme", ["none", "rotary", "alibi", "linear_cpb", "t5", "fox/alibi"])
def test_a_step_without_padding_plans_nothing(scheme, monkeypatch):
    """Nor does it compute a table or a rotation, while the numbers are the same."""
    model, past, tokens = begin(scheme)
    fail = lambda *args, **kwargs: pytest.fail("computed again")  # noqa: E731
    monkeypatch.setattr("hf_relpos.model.attention_planner.plan_attention", fail)
    monkeypatch.setattr("hf_relpos.model.scheme_registry.distance_table", fail)
    monkeypatch.setattr("hf_relpos.model.scheme_rotary.RotaryEmbedding.rotation", fail)
    with torch.no_grad():
        for index in range(4):
            model(tokens[:, index : index + 1], past_key_values=past)


@pytest.mark.parametrize("scheme", ["alibi", "linear_cpb", "t5"])
def test_a_ready_mask_keeps_the_table(scheme, monkeypatch):
    """As `generate` gives it beside a static cache."""
    model, tokens = make_model(scheme), make_tokens(2, 16)
    past, computed = StaticCache(config=model.config, max_cache_len=20), []
    kind = POSITION_EMBEDDINGS[scheme]
    bias = kind.distance_bias
    for change in (lambda model: None, behind_the_version_counter):
        with torch.no_grad():
            change(model)
            expected = model(tokens).logits
            past.reset()
            model(tokens[:, :8], past_key_values=past)
            computed.clear()
            counted = lambda self, distance: computed.append(self) or bias(self, distance)  # noqa: E731
            monkeypatch.setattr(kind, "distance_bias", counted)
            for index in range(8, 16):
                ready = (torch.arange(20) <= index)[None, None, None].expand(2, -1, -1, -1)
                step = model(tokens[:, index : index + 1], attention_mask=ready, past_key_values=past).logits
                assert_close(step[:, 0], expected[:, index], **CLOSE)
            assert len(computed) == len(set(computed)), "once for a scheme"
            monkeypatch.setattr(kind, "distance_bias", bias)
