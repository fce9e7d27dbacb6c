"""The kernels for GPUs, run by Triton's interpreter on a CPU, or on the GPU where there is one."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from test_distance_bias import make_inputs, make_masks, reference

from hf_relpos.model import attention_triton
from hf_relpos.model.attention_kernel import TableCall
from hf_relpos.model.attention_torch import block_backward, block_forward
from hf_relpos.model.attention_triton_sizes import (
    LARGE,
    MEDIUM,
    SHARED_MEMORY,
    SMALL,
    TILES,
    Tiles,
    precision_of,
    tiles_for,
)


pytest.importorskip("triton", reason="the kernels for GPUs")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def large_tiles(monkeypatch):
    """The interpreter takes a time for each tile, whatever its size."""
    if DEVICE == "cpu":
        use_tiles(monkeypatch, Tiles(64, 64, 4, 1))


def use_tiles(monkeypatch, tiles):
    monkeypatch.setattr(attention_triton, "tiles_for", lambda kernel, *sizes: [tiles])


NAMES = ("out", "query", "key", "value", "table")
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
        for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
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
        for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
            assert (ours - theirs).abs().max() < 3e-5, f"{name} of lengths {lengths}"


@pytest.mark.parametrize("masks", ["nothing", "padding and documents"])
@pytest.mark.parametrize("tiles", [Tiles(16, 32, 4, 1), Tiles(32, 16, 4, 1)], ids=["wide", "high"])
@pytest.mark.parametrize(
    "is_causal, window", [(True, None), (True, 35), (False, None)], ids=["causal", "window", "full"]
)
def test_whole_tiles_and_others_are_the_reference(is_causal, window, tiles, masks, monkeypatch):
    """Many small tiles: some whole, some at the diagonal, at both edges of a window and at the ends of the rows."""
    use_tiles(monkeypatch, tiles)
    lengths = (47, 70, 23) if is_causal else (40, 67, 21)
    *inputs, grad_out = make_inputs(lengths, num_groups=1, num_heads=2, batch_size=1)
    options = {"scaling": 0.3, "is_causal": is_causal, "offset": lengths[2], "window": window}
    options |= {name: x if x is None else x[:1] for name, x in make_masks(lengths[1], masks).items()}
    expected = expect(inputs, grad_out, **options)
    for is_deterministic in (True, False):
        actual = run(inputs, grad_out, is_deterministic, **options)
        for name, ours, theirs in zip(NAMES, actual, expected, strict=True):
            assert (ours - theirs).abs().max() < 5e-5, name


def test_biases_that_exp2_cannot_hold_leave_no_trace_after_the_last_row():
    """A row after the last one has no sum of weights: its biases alone would be infinite."""
    *inputs, grad_out = make_inputs((70, 70, 0), num_groups=2, num_heads=2, batch_size=1)
    inputs[3] = inputs[3] + 300.0
    options = {"scaling": 0.3, "is_causal": True, "offset": 0}
    for is_deterministic in (True, False):
        actual = run(inputs, grad_out, is_deterministic, **options)
        for ours, theirs in zip(actual, expect(inputs, grad_out, **options), strict=True):
            assert (ours - theirs).abs().max() < 2e-3  # of fp32 scores of 300


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
    *inputs, grad_out = make_inputs((150, 150, 0), num_groups=2, num_heads=2, batch_size=2)
    options = {"scaling": 0.3, "is_causal": True, "offset": 0}
    first, second = (run(inputs, grad_out, **options) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_what_lies_far_apart_is_found():
    """Rows whose numbers 32 bits cannot count, heads too, and numbers of a token that lie apart."""
    *inputs, grad_out = make_inputs((1, 600, 599), num_groups=1, num_heads=1, batch_size=1, dtype=torch.float16)
    far = torch.empty(600 * 2**22, dtype=torch.float16, device=DEVICE)  # of which pages that are touched take memory
    key = far.as_strided(inputs[1].shape, (far.numel(), far.numel(), 2**22, 1)).copy_(inputs[1])
    apart = torch.stack((inputs[2], inputs[2] * 0), dim=-1)[..., 0]
    options = {"scaling": 0.3, "is_causal": True, "offset": 599}
    for ours, theirs in zip(
        run((inputs[0], key, apart, inputs[3]), grad_out, **options), run(inputs, grad_out, **options), strict=True
    ):
        assert torch.equal(ours, theirs)
    *inputs, grad_out = make_inputs((20, 20, 0), num_groups=3, num_heads=3, batch_size=1, dtype=torch.float16)
    heads = far.as_strided(inputs[0].shape, (0, 2**30 + 16, 16, 1)).copy_(inputs[0])
    options["offset"] = 0
    for ours, theirs in zip(
        run((heads, *inputs[1:]), grad_out, **options), run(inputs, grad_out, **options), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_tiles_fit_what_a_card_has_room_for():
    """The compiled files of docs/results/speed/triton show that they do: tests/benchmarks."""
    for kernel, by_size in TILES.items():
        assert set(by_size) == {
            (precision, size) for precision in ("half", "tf32", "ieee") for size in (32, 64, 128, 256)
        }
        for (precision, size), by_memory in by_size.items():
            assert SMALL in by_memory and set(by_memory) <= {SMALL, MEDIUM, LARGE}
            for memory in SHARED_MEMORY.values():
                offered = tiles_for(kernel, precision, size, memory)
                assert offered == [by_memory[need] for need in sorted(by_memory, reverse=True) if need <= memory]
    assert tiles_for("forward_kernel", "half", 16, 65_536) == [TILES["forward_kernel"]["half", 32][SMALL]]


def test_tensor_cores_round_fp32_only_where_torch_may():
    x = torch.zeros(1)
    before = torch.get_float32_matmul_precision()
    try:
        for setting, precision in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(setting)
            assert precision_of(x) == precision and precision_of(x.half()) == precision_of(x.bfloat16()) == "half"
    finally:
        torch.set_float32_matmul_precision(before)


def test_what_cannot_be_launched_runs_in_operations_of_torch(monkeypatch):
    """Said once, whatever the compiler or the driver raises; running out of memory is raised."""

    def fail(*arguments):
        calls.append(arguments)
        raise OSError("no room for a\n  compiled kernel")

    calls, inputs = [], make_inputs((40, 40, 0), num_heads=2, num_groups=2, head_dim=11)
    *tensors, grad_out = inputs
    call = TableCall(0.3)
    monkeypatch.setattr(attention_triton, "_FAILED", {})
    said = []
    monkeypatch.setattr(attention_triton.logger, "warning_once", said.append)
    monkeypatch.setattr(attention_triton, "triton_forward", fail)
    monkeypatch.setattr(attention_triton, "triton_backward", fail)
    kernel = attention_triton.TritonKernel
    for _ in range(2):
        out, lse = kernel.forward(*tensors, call)
        gradients = kernel.backward(grad_out, *tensors[:3], out, lse, tensors[3], call)
    expected = block_forward(*tensors, call)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    expected = block_backward(grad_out, *tensors[:3], out, lse, tensors[3], call)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, expected, strict=True))
    assert len(calls) == len(said) == 1 and "OSError: no room for a compiled kernel." in said[0]

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention_triton, "_FAILED", {})
    monkeypatch.setattr(attention_triton, "triton_forward", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        kernel.forward(*tensors, call)


@pytest.mark.parametrize(
    "capability, head_dim, reason",
    [
        ((7, 5), 64, "compute capability 8.0 or more, not Tesla"),
        ((9, 0), 257, "head size is at most 256"),
        ((8, 6), 64, ""),
    ],
)
def test_what_is_not_served_is_said(capability, head_dim, reason, monkeypatch):
    said, device = [], SimpleNamespace(type="cuda", index=0)
    monkeypatch.setattr(attention_triton.logger, "warning_once", said.append)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Tesla T4")
    query = SimpleNamespace(is_cuda=True, dtype=torch.float16, device=device, shape=(1, 2, 3, head_dim))
    monkeypatch.setattr(attention_triton, "is_tracing", lambda x: True)
    assert attention_triton.TritonKernel.supports(query, query, None, TableCall(1.0)) == (not reason)
    assert [reason in text for text in said] == [True] * bool(reason)
