"""Schemes that look at the tokens' content: what is kept beside the keys, and their ways through a kernel."""

import pytest
import torch
from conftest import make_model, make_tokens, table_path
from torch.testing import assert_close
from transformers import DynamicCache

from hf_relpos import Positions
from hf_relpos.model import attention_planner, attention_score_bias
from hf_relpos.model.attention_key_bias import NUM_TERMS, add_key_bias, dense_key_bias, to_extra_dims


CLOSE = {"rtol": 1e-4, "atol": 2e-5}  # fp32 logits of magnitude 1..10, computed in another order


def make_fox(implementation="sdpa", **overrides):
    """With gates between 0.01 and 0.99."""
    model = make_model("fox", attn_implementation=implementation, **overrides)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.position_embeddings["fox"].gate_bias, mean=1.0, std=2.0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_channels_hold_fp32(dtype):
    """Exactly: three terms of 8 bits make 24. fp16 rounds a third term below 2^−14 to a multiple of 2^−24."""
    generator = torch.Generator().manual_seed(0)
    state = -torch.exp(torch.linspace(-9, 4, 5000).repeat(6, 1) + 0.1 * torch.randn(6, 5000, generator=generator))[None]
    channels = to_extra_dims(state, 2, dtype)
    assert channels.shape == (1, 2, 5000, 9) and channels.dtype == dtype
    held = channels.float().unflatten(3, (-1, NUM_TERMS)).sum(-1).transpose(2, 3).flatten(1, 2)
    assert_close(held, state, rtol=0, atol=2.0**-24 if dtype == torch.float16 else 0)


def attend(query, key, value, state, scaling, is_dense, padding=None):
    """→ the attention's output with the bias by definition in float64, or by the channels."""
    length = query.shape[2]
    mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    if padding is not None:
        mask = mask & padding[:, None, None]
        state = state.masked_fill(~padding[:, None], 0.0)
    if is_dense:
        mask = dense_key_bias(state, mask).masked_fill(~mask, -torch.inf)
    else:
        head_dim = value.shape[3]
        query, key, value = add_key_bias(query, key, value, state, scaling)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    )
    return out if is_dense else out[..., :head_dim]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [None, "in the middle"])
def test_channels_are_the_definition_with_gradients(dtype, padding):
    """700 tokens whose running sum reaches −500, where bf16 has steps of 2 and fp32 of 3e-5."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 700, 16, generator=generator)
    key, value = torch.randn(2, 2, 2, 700, 16, generator=generator)
    state = torch.nn.functional.logsigmoid(torch.randn(2, 6, 700, generator=generator))
    grad_out = torch.randn(2, 6, 700, 16, generator=generator).to(dtype)
    if padding is not None:
        padding = torch.rand(2, 700, generator=generator) > 0.2
        padding[:, 0] = True
    inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)] + [state.requires_grad_()]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = attend(*inputs, 0.3, False, padding), attend(*exact, 0.3, True, padding)
    # bf16: weights and their gradients are rounded before the products
    bound = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(torch.bfloat16).eps
    assert (out - expected).abs().max() < bound * expected.abs().max()
    ours = torch.autograd.grad(out, inputs, grad_out)
    theirs = torch.autograd.grad(expected, exact, grad_out.double())
    for name, actual, wanted in zip(("query", "key", "value", "state"), ours, theirs, strict=True):
        # a gate's gradient is a sum of up to 700 of the keys' gradients, most of which cancel
        assert (actual - wanted).norm() < (3 if name == "state" else 1) * bound * wanted.norm(), name


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def device_kind(request, monkeypatch):
    """Off CPUs the keys' channels go through torch's own kernels, with a mask where there is one."""
    if request.param == "as on a GPU":
        monkeypatch.setattr(attention_planner, "_last_table_position", lambda *args: -1.0)
    return request.param


def test_the_fast_path_has_no_bias_for_pairs(device_kind, monkeypatch):
    def fail(*args):
        pytest.fail("a bias for each pair of tokens")

    monkeypatch.setattr(attention_score_bias, "dense_key_bias", fail)
    model, tokens = make_fox(), make_tokens(3, 20)
    assert model.attention_path() == (table_path() if device_kind == "as on a CPU" else "sdpa:key_bias")
    mask = torch.ones_like(tokens)
    mask[1, :6], mask[2, 7:9] = 0, 0
    packed = torch.cat((torch.arange(8), torch.arange(12)))[None].expand(3, -1)
    for inputs in ({}, {"attention_mask": mask}, {"position_ids": packed}):
        model(tokens, labels=tokens, **inputs).loss.backward()
    past = model(tokens[:, :10], attention_mask=mask[:, :10], use_cache=True).past_key_values
    for start, stop in ((10, 14), (14, 15)):
        model(tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_in_the_middle_moves_no_gate(implementation, dtype, device_kind):
    """Whatever the padding's gates, in one forward and over a cache; another row has none."""
    model = make_fox(implementation, num_key_value_heads=2, initializer_range=0.05).to(dtype)
    tokens, mask = make_tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
    mask[0, 5:9], mask[0, 17] = 0, 0
    kept = mask[0].bool()
    with torch.no_grad():
        expected = model(tokens[:1, kept]).logits[0]
        whole = model(tokens, attention_mask=mask).logits
        past, pieces = DynamicCache(), []
        for start, stop in ((0, 12), (12, 20), *((step, step + 1) for step in range(20, 30))):
            chunk = tokens[:, start:stop]
            pieces.append(model(chunk, attention_mask=mask[:, :stop], past_key_values=past).logits)
    close = CLOSE if dtype == torch.float32 else {"rtol": 0, "atol": 0.03 * expected.abs().max().item()}
    for logits in (whole, torch.cat(pieces, dim=1)):
        assert_close(logits[0, kept], expected, **close)
        assert_close(logits[1], model(tokens[1:]).logits[0], **close)


@pytest.mark.parametrize("scheme", ["fox", "alibi+fox"])
def test_the_gates_stay_in_fp32_under_autocast(scheme, device_kind):
    """Sums of hundreds of gates: in bf16 they would be wrong by whole units."""
    if scheme != "fox" and device_kind != "as on a CPU":
        pytest.skip("a table is one everywhere")
    model, tokens = make_model(scheme, initializer_range=0.05), make_tokens(1, 700)
    with torch.no_grad():
        expected = model(tokens).logits
        with torch.autocast("cpu", torch.bfloat16):
            for implementation in ("sdpa", "eager"):
                model.set_attn_implementation(implementation)
                assert (model(tokens).logits - expected).abs().max() < 0.05 * expected.abs().max()


def test_gradients_are_those_of_the_dense_bias(device_kind):
    tokens, mask = make_tokens(3, 70), torch.ones(3, 70, dtype=torch.long)
    mask[1, :9], mask[2, 30:40] = 0, 0
    labels = tokens.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    models = [make_fox(implementation, num_key_value_heads=2) for implementation in ("sdpa", "eager")]
    for model in models:
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
        assert error < 1e-4, f"{name}: {error:.1e}"


@pytest.mark.parametrize("scheme", ["fire+fox", "alibi+fox", "linear_cpb+fox"])
def test_beside_a_table(scheme):
    """The table's kernel meets the keys' channels too; behind a limit of the table, a bias for pairs does."""
    tokens, mask = make_tokens(3, 40), torch.ones(3, 40, dtype=torch.long)
    mask[1, :6], mask[2, 30:] = 0, 0
    labels = tokens.masked_fill((mask == 0) | (mask.cumsum(1) == 1), -100)
    options = {"num_key_value_heads": 2, "train_length": 20}
    models = [make_model(scheme, attn_implementation=name, **options) for name in ("sdpa", "eager")]
    assert models[0].attention_path() == table_path()
    outputs = [model(tokens, attention_mask=mask, labels=labels) for model in models]
    assert_close(outputs[0].logits[labels != -100], outputs[1].logits[labels != -100], **CLOSE)
    for output in outputs:
        output.loss.backward()
    for (name, ours), theirs in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        # a gradient of one number is a sum of thousands with both signs
        assert (ours.grad - theirs.grad).norm() < (1e-2 if ours.numel() == 1 else 1e-4) * theirs.grad.norm(), name
    with torch.no_grad():
        past = models[0](tokens[:, :15], attention_mask=mask[:, :15], use_cache=True).past_key_values
        for start, stop in ((15, 24), (24, 25), (25, 40)):
            step = models[0](tokens[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past).logits
            real = mask[:, start:stop].bool()
            assert_close(step[real], outputs[1].logits[:, start:stop][real], **CLOSE)


# --- by the scores


def test_heads_that_other_ranks_hold_are_missed():
    """DAPE's MLP sees all heads: with a share of them it would compute something else."""
    model = make_model("dape")
    positions = Positions(torch.arange(3)[None], torch.arange(3)[None], None, None)
    query = torch.zeros(1, 3, 3, 8)
    with pytest.raises(ValueError, match="`tp_plan` must be None for pos_embedding_type 'dape'.*got 2 ranks"):
        model.model.layers[0].self_attn.score_bias(query, query, None, positions)


def test_cope_counts_what_its_row_sees():
    """Gates of one half: positions of 0.5, 1, .. back from the query, over padding and up to the table's end."""
    cope = make_model("cope", head_dim=1, pos_embedding_kwargs={"max_position": 3}).model.layers[0]
    cope = cope.self_attn.position_embeddings["cope"]
    with torch.no_grad():
        cope.weight.copy_(torch.tensor([[0.0], [10.0], [30.0]]))
    visible = torch.tensor([1, 1, 1, 1, 0, 1, 0], dtype=torch.bool)[None, None, None]
    positions = Positions(torch.tensor([[5]]), torch.arange(7)[None], None, visible)
    bias = cope.score_bias(torch.zeros(1, 1, 1, 7), None, torch.ones(1, 1, 1, 1), positions)
    # counts 2.5 (at most 2), 2, 1.5, 1, 0.5 on the keys that are seen
    assert bias[visible].tolist() == [30.0, 30.0, 20.0, 10.0, 5.0]
