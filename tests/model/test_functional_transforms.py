"""Transforms of `torch.func`, forward mode and derivatives of derivatives: what eager attention gives, under sdpa too.

Where torch's own attention has no second derivative (a model without a bias, outside of `torch.func`), Llama under sdpa
fails as well: there its math kernel is asked for, as one does for Llama.
"""

import logging
from contextlib import nullcontext

import pytest
import torch
from conftest import SCHEMES, make_model, make_tokens, table_path
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from hf_relpos.model.attention_distance_bias import distance_bias_attention
from hf_relpos.model.attention_kernel import TableCall, select_kernel
from hf_relpos.model.chunked_loss import linear_cross_entropy


FEW = ["none", "rotary", "alibi", "linear_cpb", "t5", "kerple_power", "fire", "fox", "alibi+fire", "rotary/none"]
TOKENS = make_tokens(3, 7)
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [0] * 2 + [1] * 5])
LABELS = TOKENS.masked_fill(MASK * torch.cat((MASK[:, :1], MASK[:, :-1]), dim=1) == 0, -100)


def parameters(model, few: bool = False) -> dict[str, torch.Tensor]:
    """All parameters, or those of the schemes that are small, and one beside them."""
    found = {name: p.detach() for name, p in model.named_parameters()}
    small = {name: p for name, p in found.items() if "position_embeddings" in name and p.numel() < 100}
    return {**small, "model.norm.weight": found["model.norm.weight"]} if few else found


def loss(model, state, tokens=TOKENS, mask=None, labels=None):
    given = {"labels": tokens if labels is None else labels, "attention_mask": mask}
    return functional_call(model, state, (tokens,), given).loss


def loss_of_embeds(model, embeds):
    return model(inputs_embeds=embeds, labels=TOKENS[: len(embeds)]).loss


def embeds(model, rows=1):
    return model.model.embed_tokens(TOKENS[:rows]).detach()


FIRST = {  # what Llama can do under sdpa
    "grad": lambda m: grad(lambda p: loss(m, p))(parameters(m)),
    "vmap": lambda m: vmap(lambda t: m(t[None]).logits)(TOKENS),
    "vmap(grad)": lambda m: vmap(lambda t: grad(lambda p: loss(m, p, t[None]))(parameters(m)))(TOKENS),
    "vmap over models": lambda m: vmap(lambda p: functional_call(m, p, (TOKENS,)).logits)(
        {name: torch.stack((p, 1.1 * p)) for name, p in parameters(m).items()}
    ),
    "jacrev": lambda m: jacrev(lambda e: m(inputs_embeds=e).logits[:, -1])(embeds(m)),
    "vmap in the backward pass": lambda m: torch.autograd.functional.jacobian(
        lambda e: loss_of_embeds(m, e), embeds(m), vectorize=True
    ),
}
FURTHER = {  # what it can only do under eager
    "vmap(grad) with padding": lambda m: vmap(
        lambda t, a, y: grad(lambda p: loss(m, p, t[None], a[None], y[None]))(parameters(m))
    )(TOKENS, MASK, LABELS),
    "jacfwd": lambda m: jacfwd(lambda e: m(inputs_embeds=e).logits[:, -1])(embeds(m)),
    "jvp(grad)": lambda m: jvp(grad(lambda e: loss_of_embeds(m, e)), (embeds(m),), (embeds(m),)),
    "hessian": lambda m: hessian(lambda p: loss(m, p))(parameters(m, few=True)),
    "grad(grad)": lambda m: grad(lambda e: grad(lambda e: loss_of_embeds(m, e))(e).square().sum())(embeds(m)),
    "dual numbers": lambda m: dual_numbers(m),
    "create_graph": lambda m: derivative_of_gradients(m, 1),
    "create_graph twice": lambda m: derivative_of_gradients(m, 2),
}


def dual_numbers(model):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(embeds(model), torch.ones_like(embeds(model)))
        return forward_ad.unpack_dual(model(inputs_embeds=x).logits).tangent.clone()


def derivative_of_gradients(model, times: int):
    with nullcontext() if model.config.has_position_bias else sdpa_kernel(SDPBackend.MATH):
        value, wanted = model(TOKENS, labels=TOKENS).loss, list(model.parameters())
        for _ in range(times):
            found = torch.autograd.grad(value, wanted, create_graph=True, allow_unused=True)
            value = sum(gradient.square().sum() for gradient in found if gradient is not None)
        return [g for g in torch.autograd.grad(value, wanted, allow_unused=True) if g is not None]


def check(scheme: str, transform, **overrides) -> None:
    """Under sdpa, with and without logits, it gives what it gives under eager attention."""
    results = []
    for implementation, skips in (("eager", False), ("sdpa", False), ("sdpa", True)):
        model = make_model(scheme, attn_implementation=implementation, **overrides)
        model.skip_logits = skips
        results.append(tree_leaves(transform(model)))
    for found in results[1:]:
        for value, expected in zip(found, results[0], strict=True):
            scale = expected.abs().max().item()
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * scale + 1e-7)
    assert any(value.any() for value in results[0])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("transform", FIRST)
def test_transforms_of_first_derivatives(scheme, transform):
    check(scheme, FIRST[transform])


@pytest.mark.parametrize("scheme", FEW)
@pytest.mark.parametrize("transform", FURTHER)
def test_further_derivatives_and_forward_mode(scheme, transform):
    check(scheme, FURTHER[transform], num_hidden_layers=2 if "/" in scheme else 1)


@pytest.mark.parametrize("transform", ["vmap(grad)", "hessian"])
def test_grouped_heads_and_windows(transform):
    sliding = {"sliding_window": 3, "layer_types": ["sliding_attention"] * 2}
    check("linear_cpb", {**FIRST, **FURTHER}[transform], num_key_value_heads=2, **sliding)


def call_attention(*tensors):
    """The operator with all that hides keys; the first row of the second document sees none."""
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :2] = False
    documents = torch.tensor([[0] * 5 + [1] * 4])
    return distance_bias_attention(*tensors, offset=2, key_mask=mask, documents=documents, window=4)


@pytest.mark.parametrize("function", [call_attention, lambda *x: distance_bias_attention(*x, is_causal=False)])
def test_the_operator_passes_gradgradcheck(function):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 7, 3), (2, 2, 9, 3), (2, 2, 9, 3), (4, 9)
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    assert torch.autograd.gradcheck(function, tensors) and torch.autograd.gradgradcheck(function, tensors)
    gradients = torch.autograd.grad(function(*tensors).sin().sum(), tensors)
    values = [x.detach() for x in tensors]
    transformed = grad(lambda *x: function(*x).sin().sum(), argnums=(0, 1, 2, 3))(*values)
    for gradient, expected in zip(transformed, gradients):
        torch.testing.assert_close(gradient, expected)
    # one tensor in two places
    x = values[1].clone().requires_grad_()
    (first,) = torch.autograd.grad(distance_bias_attention(x, x, x, values[3][:2]).square().sum(), x, create_graph=True)
    (expected,) = torch.autograd.grad(distance_bias_attention(x, x, x, values[3][:2]).square().sum(), x)
    torch.testing.assert_close(first, expected)


def test_the_chunked_loss_passes_gradgradcheck():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 5, 4), (11, 4)))
    labels = make_tokens(2, 5, vocab_size=11)
    labels[0, 2] = -100

    def first_gradients(hidden, weight):
        return grad(lambda h, w: linear_cross_entropy(h, w, labels), argnums=(0, 1))(hidden, weight)

    inputs = hidden.requires_grad_(), weight.requires_grad_()
    value = linear_cross_entropy(*inputs, labels)
    for found, expected in zip(first_gradients(hidden.detach(), weight.detach()), torch.autograd.grad(value, inputs)):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    value = sum(
        g.square().sum() for g in torch.autograd.grad(linear_cross_entropy(*inputs, labels), inputs, create_graph=True)
    )
    second = grad(lambda h, w: sum(g.square().sum() for g in first_gradients(h, w)), argnums=(0, 1))
    for found, expected in zip(torch.autograd.grad(value, inputs), second(hidden.detach(), weight.detach())):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_memory_is_said_once_and_ordinary_steps_keep_their_kernel(caplog, monkeypatch):
    logger = logging.getLogger("hf_relpos.model.functional_transforms")
    said = []
    monkeypatch.setattr(logger, "warning", lambda message, *_, **__: said.append(message))
    model = make_model("alibi", attn_implementation="sdpa")
    type(logger).warning_once.cache_clear() if hasattr(type(logger).warning_once, "cache_clear") else None
    model(TOKENS, labels=TOKENS).loss.backward()
    assert not said and model.attention_path() == table_path()
    for _ in range(2):
        grad(lambda p: loss(model, p))(parameters(model))
    assert len(said) == 1 and "a matrix of queries by keys" in said[0]
    query, table = torch.zeros(1, 1, 4, 8), torch.zeros(1, 4)
    assert select_kernel(query, query, table, TableCall(1.0)).is_operator
