"""The kernels for GPUs, run by Triton's interpreter on a CPU, or on the GPU where there is one."""

from functools import partial

import pytest
import torch
from test_distance_bias import make_inputs, make_masks, reference

from hf_relpos.model import attention_triton
from hf_relpos.model.attention_kernel import TableCall


pytest.importorskip("triton", reason="the kernels for GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTHS = [(100, 100, 0), (65, 65, 0), (1, 1, 0), (1, 70, 69), (40, 150, 110), (7, 90, 50)]


def run(inputs, grad_out, is_deterministic=True, **options):
    """→ out and the gradients of query, key, value and table."""
    query, key, value, table, grad_out = (x.to(DEVICE) for x in (*inputs, grad_out))
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    call = TableCall(**options)
    out, lse = attention_triton.triton_forward(query, key, value, table, call)
    gradients = attention_triton.triton_backward(
        grad_out, query, key, value, out, lse, table, call, is_deterministic=is_deterministic
    )
    return [x.cpu() for x in (out, *gradients)]


def expect(inputs, grad_out, **options):
    exact = [x.double().requires_grad_() for x in inputs]
    out = partial(reference, **options)(*exact)
    return out.detach(), *torch.autograd.grad(out, exact, grad_out.double())


@pytest.mark.parametrize("masks", ["nothing", "padding", "documents", "padding and documents"])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("is_deterministic", [True, False], ids=["deterministic", "fast"])
def test_kernels_are_the_reference(is_deterministic, is_causal, masks):
    for lengths in LENGTHS if masks == "nothing" else LENGTHS[:1] + LENGTHS[4:]:
        *inputs, grad_out = make_inputs(lengths, num_groups=1, num_heads=2)
        options = {"scaling": 0.3, "is_causal": is_causal, "offset": lengths[2], **make_masks(lengths[1], masks)}
        actual = run(inputs, grad_out, is_deterministic, **options)
        expected = expect(inputs, grad_out, **options)
        for name, ours, theirs in zip(("out", "query", "key", "value", "table"), actual, expected, strict=True):
            # fp32 sums of up to 3 · 100 terms of size 1 in the table's gradient
            assert (ours - theirs).abs().max() < 3e-5, f"{name} of lengths {lengths}"


@pytest.mark.parametrize("masks", ["nothing", "padding and documents"])
@pytest.mark.parametrize("window", [1, 30, 100])
@pytest.mark.parametrize("is_deterministic", [True, False], ids=["deterministic", "fast"])
def test_windows_are_the_reference(is_deterministic, window, masks):
    for lengths in LENGTHS[:1] + LENGTHS[4:]:
        *inputs, grad_out = make_inputs(lengths, num_groups=1, num_heads=2)
        inputs[3] = inputs[3][:, : min(window, lengths[1])]
        options = {"scaling": 0.3, "is_causal": True, "offset": lengths[2], "window": window}
        options |= make_masks(lengths[1], masks)
        actual = run(inputs, grad_out, is_deterministic, **options)
        expected = expect(inputs, grad_out, **options)
        for name, ours, theirs in zip(("out", "query", "key", "value", "table"), actual, expected, strict=True):
            assert (ours - theirs).abs().max() < 3e-5, f"{name} of lengths {lengths}"


@pytest.mark.parametrize("head_dim", [3, 24, 80, 160])
def test_head_sizes_and_tiles(head_dim):
    *inputs, grad_out = make_inputs((70, 70, 0), num_groups=2, num_heads=2, batch_size=1, head_dim=head_dim)
    options = {"scaling": 0.1, "is_causal": True, "offset": 0}
    for is_deterministic in (True, False):
        for ours, theirs in zip(
            run(inputs, grad_out, is_deterministic, **options), expect(inputs, grad_out, **options), strict=True
        ):
            assert (ours - theirs).abs().max() < 5e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    *inputs, grad_out = make_inputs((100, 100, 0), num_groups=1, num_heads=2, dtype=dtype)
    options = {"scaling": 0.3, "is_causal": True, "offset": 0}
    for ours, theirs in zip(run(inputs, grad_out, **options), expect(inputs, grad_out, **options), strict=True):
        # weights and score gradients are rounded to the dtype of the inputs for the matrix products
        assert (ours.double() - theirs).abs().max() < 4 * torch.finfo(dtype).eps * theirs.abs().max()


def test_two_runs_are_bit_identical_and_the_kernel_is_split():
    *inputs, grad_out = make_inputs((150, 150, 0), num_groups=2, num_heads=2)
    options = {"scaling": 0.3, "is_causal": True, "offset": 0}
    first, second = (run(inputs, grad_out, **options) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
