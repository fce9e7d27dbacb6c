"""The native kernel against a reference in float64, on what the processor has and on what others have."""

import itertools
import math
import platform

import pytest
import torch
from test_distance_bias import gradients, make_inputs, make_masks, reference

from hf_relpos.model.attention_distance_bias import distance_bias_attention
from hf_relpos.model.attention_native import native_is_ready, native_library
from hf_relpos.native import NativeError
from hf_relpos.native.build import build
from hf_relpos.native.library import Library


pytestmark = pytest.mark.skipif(not native_is_ready(), reason="no native kernel here")

NAMES = ("out", "query", "key", "value", "table")
# query length, key length, offset: a tile and a bit, several tiles, a chunk after a cache, room behind the last query
LENGTHS = [(257, 257, 0), (520, 520, 0), (70, 391, 321), (300, 430, 100)]
# flags of the compiler → what they stand for
MACHINES = {
    "AVX2": ("-march=x86-64-v3",),
    "neither AVX nor products of torch": ("-march=x86-64", "-DRELPOS_PLAIN_PRODUCTS"),
}


def check(inputs, grad_out, bound, **options):
    """Compares output and gradients with the reference, relative to the largest number of each, or to 1."""
    options = {"scaling": 0.3, "key_mask": None, "documents": None, "window": None, **options}
    ours = gradients(lambda *x: distance_bias_attention(*x, **options), inputs, grad_out)
    theirs = gradients(
        lambda *x: reference(*x, is_causal=True, **options), [x.double() for x in inputs], grad_out.double()
    )
    for name, actual, expected in zip(NAMES, ours, theirs, strict=True):
        error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1.0)
        assert error < bound, f"{name}: {error:.1e}"


@pytest.mark.parametrize("masks", ["nothing", "padding", "documents", "padding and documents"])
@pytest.mark.parametrize("window", [None, 1, 50, 290])
def test_tiles_and_blocks_fit_together(window, masks):
    """At lengths of several tiles of queries and blocks of keys."""
    for lengths, num_groups in zip(LENGTHS, (6, 3, 1, 2)):
        *inputs, grad_out = make_inputs(lengths, num_groups)
        check(inputs, grad_out, 4e-5, offset=lengths[2], window=window, **make_masks(lengths[1], masks))


@pytest.mark.parametrize("head_dim", [1, 3, 20, 64, 66, 80, 128, 200])
def test_any_head_size(head_dim):
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        *inputs, grad_out = make_inputs((130, 140, 7), 2, batch_size=2, head_dim=head_dim, dtype=dtype)
        check(inputs, grad_out, bound, scaling=head_dim**-0.5, offset=7)


@pytest.mark.parametrize("multiplies_bf16", [True, False])
@pytest.mark.parametrize("masks", ["nothing", "padding and documents"])
def test_bf16_is_as_exact_as_its_inputs(masks, multiplies_bf16, monkeypatch):
    library = native_library()
    if multiplies_bf16 and not library.multiplies_bf16:
        pytest.skip("no products of bf16 here")
    monkeypatch.setattr(library, "multiplies_bf16", multiplies_bf16)
    for lengths, window in zip(LENGTHS, (None, 50, 200, None)):
        *inputs, grad_out = make_inputs(lengths, 3, dtype=torch.bfloat16)
        check(inputs, grad_out, 2e-2, offset=lengths[2], window=window, **make_masks(lengths[1], masks))


def test_bf16_without_onednn():
    *inputs, grad_out = make_inputs((70, 70, 0), dtype=torch.bfloat16)
    with torch.backends.mkldnn.flags(enabled=False):
        check(inputs, grad_out, 2e-2, offset=0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86-64")
@pytest.mark.parametrize("machine", MACHINES)
def test_other_processors(machine, monkeypatch):
    """The same sources for what other processors have: the results differ by rounding alone."""
    try:
        library = Library(build(flags=MACHINES[machine]))
    except NativeError as error:
        pytest.skip(f"not built: {error}")
    monkeypatch.setattr("hf_relpos.model.attention_native.native_library", lambda: library)
    kinds = ("nothing", "padding and documents"), ((torch.float32, 2e-5), (torch.bfloat16, 2e-2))
    for lengths, masks, (dtype, bound) in itertools.product(LENGTHS[2:], *kinds):
        *inputs, grad_out = make_inputs(lengths, 2, dtype=dtype)
        check(inputs, grad_out, bound, offset=lengths[2], window=150, **make_masks(lengths[1], masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_runs_are_bit_identical_whatever_the_threads(dtype):
    *inputs, grad_out = make_inputs((300, 300, 0), 3, dtype=dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for num_threads in (1, 1, 2, 3):
            torch.set_num_threads(num_threads)
            found.append(gradients(distance_bias_attention, inputs, grad_out))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_documents_with_large_numbers():
    """Numbers that are equal in their lower 32 bits alone are of different documents."""
    *inputs, grad_out = make_inputs((100, 100, 0))
    documents = (torch.arange(100) // 30).expand(3, -1) << 32
    check(inputs, grad_out, 2e-5, offset=0, documents=documents)
    check(inputs, grad_out, 2e-5, offset=0, documents=documents[:1])


def test_inputs_in_any_layout():
    query, key, value, table, grad_out = make_inputs((100, 100, 0))
    wide = torch.randn(3, 6, 16, 100).transpose(2, 3)
    check([wide, key.contiguous(), value.flip(2)[:, :, ::1], table.t().contiguous().t()], grad_out, 2e-5, offset=0)
    check([query, key, value, table], torch.ones(()).expand(3, 6, 100, 16), 2e-5, offset=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_shows(dtype):
    """A query that is not a number gives none, and harms no other; so does a key, to those that see it."""
    query, key, value, table, _ = make_inputs((300, 300, 0), dtype=dtype)
    query[0, 1, 70] = math.nan
    key[1, 2, 150] = math.nan
    out = distance_bias_attention(query, key, value, table)
    broken = torch.zeros(out.shape[:3], dtype=torch.bool)
    broken[0, 1, 70] = broken[1, 2, 150:] = True
    assert torch.equal(out.isnan().any(-1), broken)


def test_scores_of_any_size():
    """Weights underflow to 0 and the largest one is 1, as in a softmax."""
    query, key, value, table, grad_out = make_inputs((130, 130, 0))
    check([query * 30, key * 30, value, table], grad_out, 2e-4, offset=0)
    check([query, key, value, table * 100], grad_out, 2e-4, offset=0)


def test_scratch_memory_is_not_left_unwritten():
    """A call gives the same after others have left something else in the memory that it takes."""
    *inputs, grad_out = make_inputs((100, 100, 0), 2)
    first = gradients(distance_bias_attention, inputs, grad_out)
    *others, other_grad = make_inputs((300, 300, 0), 2)
    gradients(distance_bias_attention, [x * math.nan for x in others[:3]] + others[3:], other_grad)
    second = gradients(distance_bias_attention, inputs, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
