#!/usr/bin/env python
"""Times attention kernels, training steps and cached steps of all schemes beside what else there is.

python -m benchmarks.run --output_dir output/benchmark

All cases of one length take turns in one process; each peak memory, and the evaluation of one long row, is measured in
a separate process. Writes benchmark.json, benchmark.md and plots of cost against length.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import KERNELS, Case, model_names
from benchmarks.measure import CLOCKS, measure_memory, profile_case, time_cases
from benchmarks.report import plot_benchmark, tables
from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import hardware, versions, write_json
from hf_relpos.model.configuration_relpos import MODEL_SIZES


PARTS = ("attention", "step", "decode", "memory", "evaluate", "profile", "compiled_step")
# part → the name whose time and memory the ratios are to
BASES = {"attention": "sdpa_causal", "step": "llama", "decode": "llama", "compiled_step": "llama"}
STEPS = ("step", "compiled_step")


@dataclass
class BenchmarkArguments:
    """What is measured."""

    output_dir: str = field(metadata={"help": "Folder for benchmark.json, benchmark.md and the plots."})
    parts: list[str] = field(
        default_factory=lambda: list(PARTS[:-1]),
        metadata={"help": f"Some of {', '.join(PARTS)}; the last takes minutes to compile, and must be asked for."},
    )
    kernels: list[str] = field(default_factory=lambda: list(KERNELS), metadata={"help": "Attention kernels."})
    models: list[str] = field(default_factory=model_names, metadata={"help": "Schemes, and models of others."})
    lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048, 8192], metadata={"help": "Lengths of attention in tokens."}
    )
    step_lengths: list[int] = field(
        default_factory=lambda: [128, 512, 2048], metadata={"help": "Lengths of training steps in tokens."}
    )
    decode_lengths: list[int] = field(
        default_factory=lambda: [128, 2048], metadata={"help": "Cached tokens before a step."}
    )
    decode_batch_sizes: list[int] = field(default_factory=lambda: [1, 8], metadata={"help": "Rows of a cached step."})
    evaluate_lengths: list[int] = field(
        default_factory=lambda: [32768], metadata={"help": "Lengths of the one row whose losses are computed."}
    )
    tokens: int = field(default=16384, metadata={"help": "Tokens of an attention, whatever the length."})
    model_size: str = field(default="xsmall", metadata={"help": "Size of the models, as --model_size of train."})
    step_tokens: int = field(default=4096, metadata={"help": "Tokens of a training step, whatever the length."})
    repeats: int = field(default=9, metadata={"help": "Rounds that count."})
    num_threads: int = field(default_factory=torch.get_num_threads, metadata={"help": "Threads of torch on a CPU."})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})
    clock: str = field(
        default="wall",
        metadata={"help": "wall, or cpu: the seconds that this process computes, for one thread on a busy machine."},
    )

    def __post_init__(self) -> None:
        for name, allowed in (("parts", PARTS), ("kernels", KERNELS), ("models", model_names())):
            unknown = [value for value in getattr(self, name) if value not in allowed]
            if unknown:
                raise ValueError(f"`{name}` must be some of {list(allowed)}, got {unknown[0]!r}.")
        for name in ("tokens", "step_tokens", "repeats", "num_threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("lengths", "step_lengths", "decode_lengths", "decode_batch_sizes", "evaluate_lengths"):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(f"`{name}` must be numbers of at least 1, got {getattr(self, name)}.")
        if self.device not in ("cpu", "cuda") or (self.device == "cuda" and not torch.cuda.is_available()):
            raise ValueError(f"`device` must be cpu or, where torch has a GPU, cuda; got {self.device!r}.")
        if self.model_size not in MODEL_SIZES:
            raise ValueError(f"`model_size` must be one of {list(MODEL_SIZES)}, got {self.model_size!r}.")
        if self.clock not in CLOCKS or (self.clock == "cpu" and self.device != "cpu"):
            raise ValueError(f"`clock` must be wall or, for the device cpu, cpu; got {self.clock!r}.")
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"`dtype` must be float32, bfloat16 or float16, got {self.dtype!r}.")


def make_groups(args: BenchmarkArguments) -> list[list[Case]]:
    """Lists of cases that take turns."""
    where = {"device": args.device, "dtype": args.dtype}
    sized = where | {"model_size": args.model_size}
    groups = []
    for length in args.lengths:
        rows = max(args.tokens // length, 1)
        for mode in ("forward", "forward_backward"):
            groups.append([Case("attention", name, length, rows, mode, **where) for name in args.kernels])
    for length in args.step_lengths:
        rows = max(args.step_tokens // length, 1)
        groups += [[Case(part, name, length, rows, **sized) for name in args.models] for part in STEPS]
    for length in args.decode_lengths:
        for rows in args.decode_batch_sizes:
            groups.append([Case("decode", name, length, rows, **sized) for name in args.models])
    return groups


def measure(args: BenchmarkArguments, skipped: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """→ "times", "memory" or "profiles" and records, group by group; `skipped` gets what cannot run."""
    groups = make_groups(args)
    for group in groups:
        if group[0].part in args.parts:
            yield "times", time_cases(group, BASES[group[0].part], args.repeats, skipped, args.clock)
    if "memory" in args.parts:
        for group in groups:
            if group[0].part in ("attention", "step") and group[0].mode != "forward":
                yield "memory", measure_memory(group, BASES[group[0].part], args.num_threads, skipped)
    if "evaluate" in args.parts:
        where = {"device": args.device, "dtype": args.dtype, "model_size": args.model_size}
        cases = [Case("evaluate", name, n, 1, **where) for n in args.evaluate_lengths for name in args.models]
        yield "memory", measure_memory(cases, "", args.num_threads, skipped)
    if "profile" in args.parts:
        longest = max((case for group in groups for case in group if case.part == "step"), key=lambda case: case.length)
        yield "profiles", [profile_case(replace(longest, name=name)) for name in args.models]


@command
def main() -> None:
    (args,) = parse_arguments((BenchmarkArguments,), __doc__)
    torch.set_num_threads(args.num_threads)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    arguments = {name: value for name, value in asdict(args).items() if name != "output_dir"}
    result: dict[str, Any] = {"arguments": arguments, "times": [], "memory": [], "profiles": [], "skipped": []}
    result |= {"versions": versions(), "hardware": hardware()}
    for kind, records in measure(args, result["skipped"]):
        result[kind] += records
        write_json(folder / "benchmark.json", result)  # what is measured stays, whatever comes
    text = tables(result)
    (folder / "benchmark.md").write_text(text, encoding="utf-8")
    print(text)
    written = [folder / "benchmark.json", folder / "benchmark.md", *plot_benchmark(result, folder)]
    print("\n".join(f"wrote {path}" for path in written))


if __name__ == "__main__":
    main()
