"""The native RMSNorm: the bits of operations of torch forward, a reference in float64 backward; who does without."""

import itertools
import platform
from types import SimpleNamespace

import pytest
import torch
from helpers import forward_over_reverse
from test_attention_native import MACHINES
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_relpos.model import norms
from hf_relpos.model.attention_native import native_library
from hf_relpos.model.fused_norm import DTYPES, check_norm, rms_norm
from hf_relpos.model.norms import RelPosRMSNorm
from hf_relpos.native import NativeError
from hf_relpos.native.build import build
from hf_relpos.native.library import Library


pytestmark = pytest.mark.skipif(native_library() is None, reason="no native kernel here")

EPS = 1e-5
# a number alone, ends of rows, rows of several parts, more rows than a thread takes
SHAPES = [(1,), (2, 3, 17), (70, 257), (3, 700, 24), (300, 33), (1, 5000)]
PAIRS = list(itertools.product(DTYPES, repeat=2))  # of the input and the weight


def make(shape, dtype=torch.float32, weight_dtype=torch.float32):
    """→ a norm, its input and a gradient of its output."""
    generator = torch.Generator().manual_seed(sum(shape))
    norm = RelPosRMSNorm(shape[-1], EPS)
    norm.weight.data = torch.randn(shape[-1], generator=generator).to(weight_dtype)
    x, grad_out = torch.randn(2, *shape, generator=generator)
    dtype_out = torch.promote_types(dtype, weight_dtype)
    return norm, (x * 3).to(dtype).requires_grad_(), grad_out.to(dtype_out)


def composite(norm, x):
    return rms_norm(x, norm.weight, norm.variance_epsilon)


def gradients(function, norm, x, grad_out):
    return torch.autograd.grad(function(x), (x, norm.weight), grad_out)


def is_fused(out) -> bool:
    return out.grad_fn is not None and out.grad_fn.name() == "FusedNormBackward"


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture(params=["here", *MACHINES])
def machine(request, monkeypatch):
    """What other processors have, in turn."""
    if request.param == "here":
        return
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86-64")
    try:
        library = Library(build(flags=MACHINES[request.param]))
    except NativeError as error:
        pytest.skip(f"not built: {error}")
    monkeypatch.setattr(norms, "native_library", lambda: library)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_outputs_have_the_bits_of_operations_of_torch(dtypes, machine):
    for shape in SHAPES:
        norm, x, _ = make(shape, *dtypes)
        out = norm(x)
        assert is_fused(out)
        assert_same(out, composite(norm, x))


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_numbers_of_every_size(dtypes):
    """Denormal, huge and not finite, in whole vectors and at the end of a row."""
    norm, x, grad_out = make((9, 67), *dtypes)
    with torch.no_grad():
        x[0] *= 1e-39
        x[1] *= 1e30
        x[2] = 0
        x[3, 5], x[3, 66], x[4, 66], x[5, 1] = torch.nan, torch.nan, torch.inf, -torch.inf
        norm.weight[2:5] *= 1e-39
        norm.weight[6] = -torch.inf
    assert_same(norm(x), composite(norm, x))
    for found, expected in zip(gradients(norm, norm, x, grad_out), gradients(rms_of(norm), norm, x, grad_out)):
        assert torch.equal(found.isfinite(), expected.isfinite())


def rms_of(norm):
    return lambda x: composite(norm, x)


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
def test_gradients_are_those_in_float64(dtypes, machine):
    for shape in SHAPES[1:]:
        norm, x, grad_out = make(shape, *dtypes)
        weight = norm.weight.detach().double().requires_grad_()
        wide = x.detach().double().requires_grad_()
        out = weight * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        expected = torch.autograd.grad(out, (wide, weight), grad_out.double())
        for found, right, leaf in zip(gradients(norm, norm, x, grad_out), expected, (x, norm.weight)):
            assert found.dtype == leaf.dtype and found.shape == leaf.shape
            bound = 2e-6 if leaf.dtype == torch.float32 else 6e-3
            assert (found - right).abs().max() < bound * right.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_runs_are_bit_identical_whatever_the_threads(dtype):
    norm, x, grad_out = make((3, 2000, 65), dtype, dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append((norm(x), *gradients(norm, norm, x, grad_out)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_what_needs_no_gradient_gets_none():
    norm, x, grad_out = make((20, 33))
    both = gradients(norm, norm, x, grad_out)
    norm.weight.requires_grad_(False)
    assert is_fused(norm(x)) and torch.equal(torch.autograd.grad(norm(x), x, grad_out)[0], both[0])
    norm.weight.requires_grad_(True)
    out = norm(x.detach())
    assert is_fused(out) and torch.equal(torch.autograd.grad(out, norm.weight, grad_out)[0], both[1])
    norm.weight.requires_grad_(False)
    assert norm(x.detach()).grad_fn is None


def test_gradients_in_any_layout_and_twice_from_one_graph():
    norm, x, _ = make((6, 33))
    out = norm(x)
    for grad_out in (torch.ones(()).expand(6, 33), torch.randn(33, 6).t()):
        found = torch.autograd.grad(out, (x, norm.weight), grad_out, retain_graph=True)
        torch.testing.assert_close(found, gradients(rms_of(norm), norm, x, grad_out))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"), torch.no_grad():
        norm.weight.mul_(2)
        out.backward(torch.ones(6, 33))


# --- derivatives of other kinds


def penalty(function, norm, x, grad_out):
    """A step on the size of the gradients."""
    found = torch.autograd.grad(function(x), (x, norm.weight), grad_out, create_graph=True)
    return torch.autograd.grad(sum(each.pow(2).sum() for each in found), (x, norm.weight))


def batched(function, norm, x, grad_out):
    many = torch.stack((grad_out, 2 * grad_out))
    return torch.autograd.grad(function(x), (x, norm.weight), many, is_grads_batched=True)


KINDS = {
    "second derivatives": penalty,
    "batched gradients": batched,
    "forward over reverse": lambda function, norm, x, g: forward_over_reverse(function, x, g),
    "func.grad": lambda function, norm, x, g: torch.func.grad(lambda x: (function(x) * g).sum())(x),
    "func.grad of grad": lambda function, norm, x, g: torch.func.grad(
        lambda x: torch.func.grad(lambda x: (function(x) * g).sum())(x).pow(2).sum()
    )(x),
    "func.vmap": lambda function, norm, x, g: torch.autograd.grad(torch.func.vmap(function)(x), x, g),
    "func.jacrev": lambda function, norm, x, g: torch.func.jacrev(function)(x[0]),
    "func.jvp": lambda function, norm, x, g: torch.func.jvp(function, (x,), (g,)),
    "checkpointing": lambda function, norm, x, g: gradients(
        lambda x: checkpoint(function, x, use_reentrant=False), norm, x, g
    ),
    "autocast": lambda function, norm, x, g: torch.autocast("cpu", torch.bfloat16)(gradients)(function, norm, x, g),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_derivatives(kind):
    norm, x, grad_out = make((4, 19))
    found, expected = (KINDS[kind](function, norm, x, grad_out) for function in (norm, rms_of(norm)))
    torch.testing.assert_close(found, expected)


# --- who does without


class Subclass(torch.Tensor):
    pass


def inference_tensor(x):
    with torch.inference_mode():
        return x.detach().clone()


OTHERS = {
    "a subclass": lambda x: x.detach().as_subclass(Subclass),
    "another layout": lambda x: x.detach().t().contiguous().t(),
    "every other number": lambda x: x.detach().repeat_interleave(2, -1)[:, ::2],
    "negated when it is read": lambda x: torch._neg_view(x.detach()),
    "inference mode": inference_tensor,
    "no numbers": lambda x: x.detach()[:0],
    "another dtype": lambda x: x.detach().half(),
    "float64": lambda x: x.detach().double(),
    "meta": lambda x: x.detach().to("meta"),
    "broadcast": lambda x: x.detach()[:, :1].contiguous(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_inputs_of_other_kinds(kind):
    norm, x, _ = make((5, 19))
    norm = norm.to("meta") if kind == "meta" else norm
    x = OTHERS[kind](x)
    out, expected = norm(x), composite(norm, x)
    assert not is_fused(out) and type(out) is type(expected) and out.stride() == expected.stride()
    if kind != "meta":
        assert_same(out, expected)
        assert_same(*(torch.autograd.grad(each.sum(), norm.weight) for each in (out, expected)))


def test_graphs_and_modes_see_operations_of_torch():
    norm, x, _ = make((5, 19))
    expected = composite(norm, x)
    for traced in (
        symbolic_trace(norm),
        make_fx(norm)(x),
        torch.jit.trace(norm, x),
        torch.export.export(norm, (x,)).module(),
        torch.compile(norm, backend="eager", fullgraph=True),
    ):
        assert_same(traced(x), expected)
    with FlopCounterMode(display=False):
        assert not is_fused(norm(x))
    assert is_fused(norm(x)), "the negative control"


@pytest.mark.parametrize("library", [None, SimpleNamespace(), SimpleNamespace(norm_interface=2)], ids=str)
def test_without_the_library_or_with_another_version(library, monkeypatch):
    monkeypatch.setattr(norms, "native_library", lambda: library)
    norm, x, _ = make((5, 19))
    out = norm(x)
    assert not is_fused(out)
    assert_same(out, composite(norm, x))


@pytest.mark.parametrize("part", range(3))
def test_a_norm_that_is_wrong_is_found_when_it_is_loaded(part, monkeypatch):
    """One bit of the output; one of the gradients by more than rounding."""
    library = native_library()
    check_norm(library)
    right = library.norm_backward if part else library.norm_forward

    def wrong(*args, **kwargs):
        found = list(right(*args, **kwargs))
        found[max(part - 1, 0)].mul_(1.1 if part else 1 + 2**-7)
        return found

    monkeypatch.setattr(library, "norm_backward" if part else "norm_forward", wrong)
    with pytest.raises(RuntimeError, match="it is off by .* in the norm of torch.float32"):
        check_norm(library)
