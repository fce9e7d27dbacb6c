"""The native dropout: published random words, the arithmetic of torch, one mask forward and backward; who does
without."""

from contextlib import nullcontext
from functools import reduce
from operator import and_, or_
from types import SimpleNamespace

import pytest
import torch
from helpers import forward_over_reverse
from test_fused_norm import OTHERS, assert_same, machine  # noqa: F401
from torch import nn
from torch.fx import symbolic_trace
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from hf_relpos.model import norms
from hf_relpos.model.attention_native import native_library
from hf_relpos.model.fused_dropout import DTYPES, check_dropout, dropout_factors, philox
from hf_relpos.model.norms import RelPosDropout


pytestmark = pytest.mark.skipif(native_library() is None, reason="no native kernel here")

P = 0.1
# a number alone, whole blocks of 64 and ends of them, more than a thread takes
SHAPES = [(1,), (7, 17), (64,), (3, 700, 24), (2, 32800)]


def make(shape=(40, 33), dtype=torch.float32):
    x, grad_out = torch.randn(2, *shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    return x.requires_grad_(), grad_out


def after_seed(function, seed=3):
    torch.manual_seed(seed)
    return function()


def is_fused(out) -> bool:
    return out.grad_fn is not None and out.grad_fn.name() == "_FusedDropoutBackward"


# --- the numbers


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_published_words(counter, key, words):
    """Of kat_vectors in Random123."""
    assert tuple(int(word) for word in philox([torch.tensor(word) for word in counter], key)) == words


def test_the_library_has_the_published_words():
    """Seed 0: a word drops if it is below the threshold, and else does not."""
    x = torch.ones(64)
    for place, word in zip((0, 16, 32, 48), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)):
        kept, dropped = (native_library().dropout(x, 0, threshold, 2.0)[place] for threshold in (word, word + 1))
        assert (kept, dropped) == (2, 0)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_depends_on_seed_and_place_alone(dtype):
    """On every processor it is that of operations of torch."""
    library = norms.native_library()
    for shape, seed in zip(SHAPES, (0, 1, -1, 2**63 - 1, -(2**63))):
        x, _ = make(shape, dtype)
        scale = float(dropout_factors(torch.Size([1]), 0, P, dtype))
        found = library.dropout(x.detach(), seed, round(P * 2**32), scale)
        assert_same(found, x.detach() * dropout_factors(x.shape, seed, P, dtype))
    check_dropout(library)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.3, 0.9, 1e-12, 1 - 2**-40])
def test_what_is_kept_is_computed_as_by_torch(p, dtype):
    """Also NaN, infinite, denormal and huge numbers and signs of zeros, of what is dropped too."""
    x = make((300,), dtype)[0].detach()
    x[::7], x[1::11], x[2::13], x[3::17], x[4::19] = torch.nan, torch.inf, -torch.inf, 1e-39, 3e38
    is_kept = after_seed(lambda: RelPosDropout(p)(torch.ones(300))) > 0
    expected = x * is_kept.to(dtype).div_(1 - p)
    out = after_seed(lambda: RelPosDropout(p)(x))
    assert_same(out, expected)
    assert torch.equal(out.signbit() & ~out.isnan(), expected.signbit() & ~out.isnan())
    assert is_kept.all() or p > 1e-12


@pytest.mark.parametrize("p", [0, 0.0, 1, 1.0])
def test_the_ends_of_the_range(p):
    x, grad_out = make()
    state = torch.get_rng_state()
    out, expected = RelPosDropout(p)(x), nn.Dropout(p)(x)
    assert_same(out, expected)
    assert_same(*(torch.autograd.grad(each, x, grad_out, retain_graph=True)[0] for each in (out, expected)))
    assert torch.equal(torch.get_rng_state(), state)
    for wrong in (1.5, -0.1):
        dropout = RelPosDropout()
        dropout.p = wrong
        with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
            dropout(x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.001])
def test_as_many_are_dropped_as_should_be(p):
    """Shares of numbers, and of pairs of them, are off by at most 5 standard deviations, where one seed in 1.7 million
    is off by more."""
    size = 2**20
    first, second = (after_seed(lambda: RelPosDropout(p)(torch.ones(size)), seed) == 0 for seed in (1, 2))
    pairs = [first & first.roll(lag) for lag in (1, 2, 16, 48, 64, 1024)] + [first & second]
    for dropped, share in ((first, p), (second, p), *((pair, p * p) for pair in pairs)):
        # a pair shares a number with two others: their covariances widen the distribution
        variance = share * (1 - share) + (0 if share == p else 2 * (p**3 - p**4))
        assert abs(float(dropped.double().mean()) - share) < 5 * (variance / size) ** 0.5
    out = after_seed(lambda: RelPosDropout(p)(torch.ones(size))).double()
    assert abs(float(out.var()) - p / (1 - p)) < 5 * (p / (1 - p) ** 3 * (1 - 2 * p) ** 2 / size) ** 0.5 + 1e-5


# --- one mask


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_whatever_the_threads(dtype):
    x, grad_out = make(SHAPES[-1], dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 1, 2, 3):
            torch.set_num_threads(num_threads)
            out = after_seed(lambda: RelPosDropout(P)(x))
            found.append((out, *torch.autograd.grad(out, x, grad_out)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_has_the_mask_and_nothing_is_kept(dtype):
    kept = []
    for shape in SHAPES:
        x, grad_out = make(shape, dtype)
        ones = torch.ones_like(x, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
            out = RelPosDropout(P)(ones)
        assert is_fused(out) and not kept
        assert_same(torch.autograd.grad(out, ones, grad_out)[0], grad_out * out)
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        nn.Dropout(P)(x)
    assert kept, "the negative control"


def test_gradients_in_any_layout_and_twice_from_one_graph():
    x, _ = make()
    factors = after_seed(lambda: RelPosDropout(P)(torch.ones_like(x))).detach()
    out = after_seed(lambda: RelPosDropout(P)(x))
    for grad_out in (torch.ones(()).expand(40, 33), torch.randn(33, 40).t()):
        assert_same(torch.autograd.grad(out, x, grad_out, retain_graph=True)[0], grad_out * factors)


def test_the_generator_of_torch_gives_one_number_a_call():
    x, _ = make()
    dropout = RelPosDropout(P)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        first, second = dropout(x), dropout(x)
    assert not torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():  # as where reentrant checkpoints begin
        assert torch.equal(dropout(x), first)
    with torch.device("meta"):
        assert torch.equal(dropout(x), second)
    number = torch.randn(1)
    torch.set_rng_state(state)
    for _ in range(2):
        torch.empty(1, dtype=torch.int64).random_(-(2**63), None)
    assert torch.equal(torch.randn(1), number), "nothing else was drawn"
    assert not torch.equal(after_seed(lambda: dropout(x), 6), first), "the negative control"


def test_seeds_have_64_bits(monkeypatch):
    seeds, right = [], native_library().dropout
    monkeypatch.setattr(native_library(), "dropout", lambda x, seed, *args: seeds.append(seed) or right(x, seed, *args))
    torch.manual_seed(0)
    for _ in range(30):
        RelPosDropout(P)(torch.ones(1))
    assert reduce(or_, seeds) == -1 and reduce(and_, seeds) == 0 and len(set(seeds)) == 30


@pytest.mark.parametrize("looks_on", ["nobody", "forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_changes_nothing(use_reentrant, looks_on):
    """Nor does a mode of dispatch that sees one of the two passes alone."""

    def mode(name):
        return FlopCounterMode(display=False) if looks_on == name else nullcontext()

    x, grad_out = make()
    block = nn.Sequential(nn.Linear(33, 33), RelPosDropout(P), nn.GELU(), nn.Linear(33, 33), RelPosDropout(P))
    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant)):
        with mode("forward"):
            out = after_seed(lambda run=run: run(x))
        torch.manual_seed(9)
        block.zero_grad()
        with mode("backward"):
            out.backward(grad_out)
        found.append((out, x.grad, *(parameter.grad for parameter in block.parameters())))
        x.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# --- derivatives of other kinds


def cubed(function, x, grad_out):
    """A step on the size of the gradients, and on the size of its own."""
    (first,) = torch.autograd.grad(function(x).pow(3), x, grad_out, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
    return first, second, *torch.autograd.grad(second.pow(2).sum(), x)


def batched(function, x, grad_out):
    return torch.autograd.grad(function(x), x, torch.stack((grad_out, 2 * grad_out)), is_grads_batched=True)


KINDS = {
    "higher derivatives": cubed,
    "batched gradients": batched,
    "forward over reverse": forward_over_reverse,
    "autocast": lambda function, x, g: torch.autocast("cpu", torch.bfloat16)(torch.autograd.grad)(function(x), x, g),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_derivatives(kind):
    x, grad_out = make((4, 19))
    factors = after_seed(lambda: RelPosDropout(0.4)(torch.ones_like(x))).detach()
    found = after_seed(lambda: KINDS[kind](RelPosDropout(0.4), x, grad_out))
    torch.testing.assert_close(found, KINDS[kind](lambda x: x * factors, x, grad_out))


TRANSFORMS = {
    "grad": lambda function, x, g: torch.func.grad(lambda x: (function(x) * g).sum())(x),
    "jvp": lambda function, x, g: torch.func.jvp(function, (x,), (g,)),
    "vmap, different": lambda function, x, g: torch.func.vmap(function, randomness="different")(x),
    "vmap, same": lambda function, x, g: torch.func.vmap(function, randomness="same")(x),
    "vmap over rows of seen numbers": lambda function, x, g: torch.func.vmap(
        lambda g: function(x) * g, randomness="same"
    )(g),
}


@pytest.mark.parametrize("kind", TRANSFORMS)
def test_transforms_have_the_dropout_of_torch(kind):
    x, grad_out = make((4, 19))
    functions = RelPosDropout(P), nn.Dropout(P)
    assert_same(*(after_seed(lambda f=f: TRANSFORMS[kind](f, x, grad_out)) for f in functions))
    for function in functions:
        with pytest.raises(RuntimeError, match="vmap: called random operation"):
            torch.func.vmap(function)(x)


# --- who does without


@pytest.mark.parametrize("kind", [kind for kind in OTHERS if kind != "broadcast"])
def test_inputs_of_other_kinds(kind):
    x = OTHERS[kind](make()[0])
    out, expected = (after_seed(lambda each=each: each(P)(x)) for each in (RelPosDropout, nn.Dropout))
    assert not is_fused(out) and type(out) is type(expected) and out.stride() == expected.stride()
    if kind != "meta":
        assert_same(out, expected)


def test_graphs_see_operations_of_torch():
    x, _ = make((5, 19))
    dropout = RelPosDropout(P)
    expected = after_seed(lambda: nn.Dropout(P)(x))
    torch._dynamo.reset()
    for traced in (
        symbolic_trace(dropout),
        make_fx(dropout)(x),
        make_fx(dropout, pre_dispatch=True)(x),
        torch.jit.trace(dropout, x, check_trace=False),
        torch.export.export(dropout, (x,)).module(),
        torch.compile(dropout, backend="eager", fullgraph=True),
    ):
        assert_same(after_seed(lambda traced=traced: traced(x)), expected)
    assert is_fused(dropout(x)), "the negative control"


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def test_modes_see_operations_of_torch_with_the_same_numbers():
    x, grad_out = make((5, 19))
    expected = after_seed(lambda: RelPosDropout(P)(x))
    with Seen() as seen:
        out = after_seed(lambda: RelPosDropout(P)(x))
        assert "aten::mul.Tensor" in seen.names
        seen.names.clear()
        (gradient,) = torch.autograd.grad(out, x, grad_out)
        assert "aten::mul.Tensor" in seen.names
    assert_same(out, expected)
    assert_same(gradient, torch.autograd.grad(expected, x, grad_out)[0])


@pytest.mark.parametrize("library", [None, SimpleNamespace(), SimpleNamespace(dropout_interface=2)], ids=str)
def test_without_the_library_or_with_another_version(library, monkeypatch):
    monkeypatch.setattr(norms, "native_library", lambda: library)
    x, _ = make()
    assert_same(*(after_seed(lambda each=each: each(P)(x)) for each in (RelPosDropout, nn.Dropout)))


@pytest.mark.parametrize("settings", [dict(inplace=True), dict(p=torch.tensor(P))], ids=str)
def test_dropouts_that_are_set_otherwise(settings):
    x = make()[0].detach()
    dropouts = (each(**{"p": P} | settings) for each in (RelPosDropout, nn.Dropout))
    assert_same(*(after_seed(lambda each=each: each(x.clone())) for each in dropouts))
    assert RelPosDropout(P).eval()(x) is x


def test_hooks_are_called():
    x, _ = make()
    dropout, seen = RelPosDropout(P), []
    expected = after_seed(lambda: dropout(x))
    dropout.register_forward_pre_hook(lambda module, args: seen.append("before"))
    dropout.register_forward_hook(lambda module, args, out: seen.append("after") or 2 * out)
    dropout.register_full_backward_hook(lambda *args: seen.append("backward"))
    out = after_seed(lambda: norms.drop(dropout, x))
    out.sum().backward()
    assert seen == ["before", "after", "backward"] and torch.equal(out, 2 * expected)


@pytest.mark.parametrize("part", ["the mask", "the scale", "bf16"])
def test_a_dropout_that_is_wrong_is_found_when_it_is_loaded(part, monkeypatch):
    library = native_library()
    right = library.dropout

    def wrong(x, seed, threshold, scale):
        if part == "the mask":
            return right(x, seed + 2**32, threshold, scale)
        return right(x, seed, threshold, scale * (1 if part == "bf16" and x.dtype == torch.float32 else 1 + 2**-7))

    monkeypatch.setattr(library, "dropout", wrong)
    with pytest.raises(
        RuntimeError, match=f"it is off by .* in the dropout of torch.{'b' if part == 'bf16' else ''}float"
    ):
        check_dropout(library)
