#!/usr/bin/env python
"""Checks the kernels for a table of the distances on a GPU, then times them beside what else there is, in minutes.

python -m benchmarks.gpu --output_dir output/gpu

Each kernel is compared with attention in float64, forward and all gradients, and two runs with each other bit by bit.
Then forward and backward are timed: causal SDPA (FlashAttention of torch), flash-attn where it is installed,
FlexAttention, SDPA with a dense bias, and ours, deterministic and fast. Writes gpu.json and gpu.md, which says what the
minutes did not suffice for. `--device cpu` does the same with the kernels for CPUs. Fails if a check fails.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case
from benchmarks.measure import time_cases
from benchmarks.report import ratio_table
from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import hardware, versions, write_json
from hf_relpos.model.attention_dense import dense_attention
from hf_relpos.model.attention_kernel import TableCall, select_kernel
from hf_relpos.model.attention_triton import triton_backward, triton_forward


KERNELS = ("sdpa_causal", "flash_attn", "sdpa_dense_bias", "distance_bias", "distance_bias_fast")
MODES = ("forward_backward", "forward")
NAMES = ("out", "query", "key", "value", "table")
# the largest error that rounding explains, of the largest number of a tensor
BOUNDS = {"float32": 1e-4, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
# name → query length, key length, offset, and what the call has
CALLS: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {
    "causal": ((300, 300, 0), ()),
    "full": ((150, 301, 100), ("full",)),
    "all masks": ((300, 300, 0), ("padding", "documents", "window")),
    "chunk of a cache": ((130, 333, 170), ("groups",)),
}


@dataclass
class GpuArguments:
    """What is checked and timed."""

    output_dir: str = field(metadata={"help": "Folder for gpu.json and gpu.md."})
    device: str = field(default="cuda", metadata={"help": "cuda or cpu."})
    lengths: list[int] = field(
        default_factory=lambda: [512, 1024, 2048, 4096, 8192, 16384], metadata={"help": "Lengths that are timed."}
    )
    flex_lengths: list[int] = field(
        default_factory=lambda: [2048, 8192],
        metadata={"help": "Lengths at which FlexAttention is timed, which is compiled for each."},
    )
    head_sizes: list[int] = field(default_factory=lambda: [64, 128], metadata={"help": "Head sizes that are timed."})
    check_head_sizes: list[int] = field(
        default_factory=lambda: [32, 64, 80, 128, 256],
        metadata={"help": "Head sizes that are checked; all kinds of calls at the first of `head_sizes`."},
    )
    dtypes: list[str] = field(
        default_factory=lambda: ["bfloat16", "float16", "float32"], metadata={"help": "What is timed in."}
    )
    num_heads: int = field(default=16, metadata={"help": "Heads of what is timed."})
    tokens: int = field(default=16384, metadata={"help": "Tokens of a pass, whatever the length."})
    repeats: int = field(default=9, metadata={"help": "Rounds that count."})
    minutes: float = field(default=9.0, metadata={"help": "After so many nothing more is begun."})

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"`device` must be cpu or, where torch has a GPU, cuda; got {self.device!r}.")
        unknown = [dtype for dtype in self.dtypes if dtype not in ("bfloat16", "float16", "float32")]
        if unknown:
            raise ValueError(f"`dtypes` must be some of float32, bfloat16 and float16, got {unknown[0]!r}.")
        for name in ("lengths", "flex_lengths", "head_sizes", "check_head_sizes"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"`{name}` must be numbers of at least 1, got {getattr(self, name)}.")
        for name in ("num_heads", "tokens", "repeats", "minutes"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be above 0, got {getattr(self, name)}.")


# --- checks


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Products of fp32 matrices in "tf32" or "ieee", as a user sets them."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _inputs(name: str, head_size: int, dtype: str, device: str) -> tuple[list[torch.Tensor], torch.Tensor, TableCall]:
    """→ query, key, value and table, the gradient of the output, and the call."""
    (query_length, num_keys, offset), parts = CALLS[name]
    generator = torch.Generator().manual_seed(0)
    batch_size, num_heads, num_groups = 2, 4, 2 if "groups" in parts else 4

    def draw(length: int, heads: int) -> torch.Tensor:
        x = torch.randn(batch_size, length, heads, head_size, generator=generator)
        return x.to(device, torch.float32 if dtype == "tf32" else getattr(torch, dtype)).transpose(1, 2)

    tensors = [draw(query_length, num_heads), draw(num_keys, num_groups), draw(num_keys, num_groups)]
    table = torch.randn(num_heads, num_keys + query_length, generator=generator).to(device)
    key_mask = documents = None
    if "padding" in parts:
        key_mask = (torch.rand(batch_size, num_keys, generator=generator) > 0.2).to(device)
        key_mask[1, : num_keys // 2] = False  # rows that see nothing
    if "documents" in parts:
        documents = (torch.arange(num_keys) // 77).expand(batch_size, -1).to(device)
    window = 70 if "window" in parts else None
    call = TableCall(head_size**-0.5, "full" not in parts, offset, key_mask, documents, window)
    return [*tensors, table], draw(query_length, num_heads), call


def _passes(device: str, inputs: list[torch.Tensor], call: TableCall) -> dict[str, tuple[Callable, Callable]]:
    """→ name → forward and backward pass of the kernels that serve here."""
    if device == "cpu":
        kernel = select_kernel(*inputs[:2], inputs[3], call)
        return {kernel.name: (kernel.forward, kernel.backward)}
    fast = partial(triton_backward, is_deterministic=False)
    return {"triton": (triton_forward, triton_backward), "triton, fast": (triton_forward, fast)}


def check_call(name: str, head_size: int, dtype: str, device: str) -> list[dict[str, Any]]:
    """Compares the kernels with attention in float64.

    Returns:
        a record for each: `errors` of the output and the gradients, as parts of the largest number of each tensor;
        `is_reproducible`, whether a second run gave the same bits; `passed`; or `failed` with a reason.
    """
    inputs, grad_out, call = _inputs(name, head_size, dtype, device)
    exact = [x.double().requires_grad_() for x in inputs]
    out = dense_attention(*exact, call)
    expected = [out.detach(), *torch.autograd.grad(out, exact, grad_out.double())]
    records = []
    for kernel, passes in _passes(device, inputs, call).items():
        record: dict[str, Any] = {"kernel": kernel, "call": name, "head_size": head_size, "dtype": dtype}
        try:
            with fp32_products("tf32" if dtype == "tf32" else "ieee"):
                first, second = (_run(*passes, inputs, grad_out, call) for _ in range(2))
        except Exception as error:  # a kernel that does not compile must not hide the others
            records.append({**record, "passed": False, "failed": f"{type(error).__name__}: {error}"[:500]})
            continue
        pairs = zip(first, expected, strict=True)
        errors = [float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30)) for a, b in pairs]
        same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        passed = max(errors) < BOUNDS[dtype] and (same or "fast" in kernel)
        errors_by_name = dict(zip(NAMES, errors, strict=True))
        records.append({**record, "errors": errors_by_name, "is_reproducible": same, "passed": passed})
    return records


def _run(
    forward: Callable, backward: Callable, inputs: list[torch.Tensor], grad_out: torch.Tensor, call: TableCall
) -> list[torch.Tensor]:
    out, lse = forward(*inputs, call)
    *tensors, table = inputs
    return [out, *backward(grad_out, *tensors, out, lse, table, call)]


def check_large(device: str) -> list[dict[str, Any]]:
    """Rows longer than 32 bits count, and more of them than the grid of a GPU has places, against small ones."""
    if device == "cpu" or torch.cuda.mem_get_info()[0] < 14 * 2**30:
        return []
    length, stride = 4096, 2**20
    dense = torch.randn(1, length, 1, 64, device=device, dtype=torch.bfloat16).transpose(1, 2)
    far = torch.empty(1, length, 1, stride, device=device, dtype=torch.bfloat16)[..., :64].transpose(1, 2).copy_(dense)
    table, call = torch.randn(1, length, device=device), TableCall(0.125)
    with torch.no_grad():
        long_rows = torch.equal(
            triton_forward(far, far, far, table, call)[0], triton_forward(dense, dense, dense, table, call)[0]
        )
        del far
        many = torch.randn(70_000, 1, 16, 32, device=device, dtype=torch.bfloat16)
        outs = [triton_forward(x, x, x, table, call)[0] for x in (many, many[-3:])]
    about = {"kernel": "triton", "head_size": 64, "dtype": "bfloat16"}
    return [
        {**about, "call": "row of 2^32 numbers", "passed": long_rows},
        {**about, "call": "batch of 70,000", "head_size": 32, "passed": torch.equal(outs[0][-3:], outs[1])},
    ]


def check_groups(args: GpuArguments) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """→ names and functions that check, the quickest to compile first."""
    first = args.head_sizes[0]
    for dtype in ("bfloat16", "float32"):
        for name in CALLS:
            yield f"check of {name} in {dtype}", partial(check_call, name, first, dtype, args.device)
    if args.device == "cuda":
        yield "check of large tensors", partial(check_large, args.device)
    others = [(size, dtype) for size in args.check_head_sizes if size != first for dtype in ("bfloat16", "float32")]
    for size, dtype in [*others, (first, "float16"), *([(first, "tf32")] if args.device == "cuda" else [])]:
        yield f"check of head size {size} in {dtype}", partial(check_call, "causal", size, dtype, args.device)


# --- times


def time_groups(
    args: GpuArguments, skipped: list[dict[str, Any]]
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """→ names and functions that time, forward and backward first."""
    for mode in MODES:
        for dtype in args.dtypes:
            for head_size in args.head_sizes:
                for length in args.lengths:
                    flex = ("flex_table",) if length in args.flex_lengths and mode == MODES[0] else ()
                    rows = max(args.tokens // length, 1)
                    where = {"device": args.device, "dtype": dtype}
                    where |= {"num_heads": args.num_heads, "head_dim": head_size}
                    cases = [Case("attention", name, length, rows, mode, **where) for name in (*KERNELS, *flex)]
                    what = f"{mode} at {length} in {dtype}, head size {head_size}"
                    yield what, partial(time_cases, cases, "sdpa_causal", args.repeats, skipped)


def text_of(result: dict[str, Any]) -> str:
    """Markdown of a result file."""
    arguments, found = result["arguments"], result["hardware"]
    where = found.get("gpu", found["cpu"]) if arguments["device"] == "cuda" else found["cpu"]
    passed = sum(check["passed"] for check in result["checks"])
    lines = [f"{where}, torch {result['versions']['torch']}; {passed} of {len(result['checks'])} checks passed."]
    for check in result["checks"]:
        if not check["passed"]:
            reason = check.get("failed") or check.get("errors") or "other bits"
            lines += ["", f"- {check['kernel']}, {check['call']}, {check['dtype']}, {check['head_size']}: {reason}"]
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for record in result["times"]:
        groups.setdefault((record["mode"], record["dtype"], record["head_dim"]), []).append(record)
    for (mode, dtype, head_size), records in groups.items():
        title = f"{mode.replace('_', ' and ')}, {dtype}, head size {head_size}, {arguments['tokens']} tokens"
        lines += ["", f"**{title}**, ratio to causal SDPA", "", ratio_table(records)]
    if result["skipped"]:
        reasons = dict.fromkeys(f"- {case['name']} ({case['dtype']}): {case['reason']}" for case in result["skipped"])
        lines += ["", "**Skipped**", "", *reasons]
    if result["left_out"]:
        lines += ["", f"**The minutes did not suffice for** {'; '.join(result['left_out'])}."]
    return "\n".join(lines) + "\n"


@command
def main() -> None:
    (args,) = parse_arguments((GpuArguments,), __doc__)
    started, folder = time.monotonic(), Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    result: dict[str, Any] = {"arguments": arguments, "checks": [], "times": [], "skipped": [], "left_out": []}
    result |= {"versions": versions(), "hardware": hardware()}
    groups = [("checks", *group) for group in check_groups(args)]
    groups += [("times", *group) for group in time_groups(args, result["skipped"])]
    for kind, name, run in groups:
        if time.monotonic() - started > 60 * args.minutes:
            result["left_out"].append(name)
            continue
        result[kind] += run()
        result["seconds"] = round(time.monotonic() - started, 1)
        write_json(folder / "gpu.json", result)  # what is measured stays, whatever comes
    write_json(folder / "gpu.json", result)
    text = text_of(result)
    (folder / "gpu.md").write_text(text, encoding="utf-8")
    print(text)
    failed = [check for check in result["checks"] if not check["passed"]]
    if failed:
        raise ValueError(f"{len(failed)} of {len(result['checks'])} checks failed; they are in {folder / 'gpu.md'}.")


if __name__ == "__main__":
    main()
