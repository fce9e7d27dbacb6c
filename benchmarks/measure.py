"""Fair timings: cases take turns in one process, the memory of each case is measured in a separate process."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.cases import Case, Unsupported


# of the matrices whose product is the most that a device can do: a small product is over before a GPU is told of it
PEAK_SIZES = {"cpu": 2048, "cuda": 8192}
# runs in one sample, where one alone is too short for the clock, or a GPU would wait to be told of the next one
SHORT_RUNS = 5
# "cpu" counts what the threads of this process compute, whatever else the machine does
CLOCKS: dict[str, Callable[[], float]] = {"wall": lambda: time.perf_counter(), "cpu": lambda: time.process_time()}


def summarize(samples: Sequence[float]) -> dict[str, float]:
    """Seconds → their median, minimum and the distance between the quartiles."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else [samples[0]] * 3
    return {
        "seconds": statistics.median(samples),
        "min_seconds": min(samples),
        "iqr_seconds": quartiles[2] - quartiles[0],
    }


def time_together(
    runs: dict[Any, Callable[[], None]], repeats: int, device: str, progress: tqdm | None = None, clock: str = "wall"
) -> dict[Any, list[float]]:
    """Runs all in turn, `repeats` times after one round that does not count; each round begins with another.

    Returns:
        key → seconds of each round on the clock, one of `CLOCKS`, in the order of the rounds.
    """
    samples: dict[Any, list[float]] = {key: [] for key in runs}
    order = list(runs)
    for round_index in range(repeats + 1):
        for key in order:
            seconds = _time(runs[key], device, clock)
            if round_index:
                samples[key].append(seconds)
            if progress is not None:
                progress.update()
        order = order[1:] + order[:1]
    return samples


def _time(run: Callable[[], None], device: str, clock: str = "wall") -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    now = CLOCKS[clock]
    start = now()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return now() - start


def time_cases(
    cases: Sequence[Case], base: str, repeats: int, skipped: list[dict[str, Any]], clock: str = "wall"
) -> list[dict[str, Any]]:
    """Times cases that differ in their name alone against each other.

    Args:
        cases: of one part, length, batch size and mode.
        base: the name whose time the ratios are to.
        repeats: number of rounds.
        skipped: gets the cases that cannot run here, with their reasons.
        clock: one of `CLOCKS`.

    Returns:
        a record for each case that ran: its fields, seconds, and `ratio`, the median over the rounds of its time
        divided by that of the base in the same round.
    """
    device, first = cases[0].device, cases[0]
    runs, times = {}, SHORT_RUNS if first.part == "decode" or device == "cuda" else 1
    for case in cases:
        try:
            run = case.build()
            run()
            runs[case.name] = _repeat(run, times)
        except (Unsupported, NotImplementedError, ValueError, RuntimeError) as error:
            skipped.append({**asdict(case), "reason": _one_line(error)})
    peak_key = object()
    if first.part == "attention":
        runs[peak_key] = _repeat(_matrix_product(first), times)
    description = " ".join(str(x) for x in (first.part, first.mode, first.batch_size, "x", first.length) if x)
    with tqdm(total=len(runs) * (repeats + 1), desc=description, leave=False) as progress:
        samples = time_together(runs, repeats, device, progress, clock)
    samples = {name: [seconds / times for seconds in found] for name, found in samples.items()}
    peak = 2 * PEAK_SIZES[device] ** 3 / statistics.median(samples.pop(peak_key)) if peak_key in samples else None
    records = []
    for case in cases:
        if case.name in samples:
            records.append(_record(case, samples[case.name], samples.get(base), peak))
    return records


def _repeat(run: Callable[[], None], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            run()

    return repeated


def _matrix_product(case: Case) -> Callable[[], None]:
    """A product of two square matrices: what the machine can do at its best, in the same rounds."""
    size = PEAK_SIZES[case.device]
    a, b = torch.randn(2, size, size, device=case.device, dtype=getattr(torch, case.dtype))
    return lambda: torch.mm(a, b)


def _record(case: Case, samples: list[float], base: list[float] | None, peak: float | None) -> dict[str, Any]:
    record = {**asdict(case), **summarize(samples)}
    if base is not None:
        record["ratio"] = statistics.median(ours / theirs for ours, theirs in zip(samples, base, strict=True))
    if peak is not None:
        record |= {"flops": count_flops(case), "matmul_flops_per_second": peak}
        record["share_of_matmul"] = record["flops"] / record["seconds"] / peak
    return record


def count_flops(case: Case) -> int:
    """Floating point operations of causal attention: two products forward and five backward for each visible pair."""
    pairs = case.batch_size * case.num_heads * case.length * (case.length + 1) // 2
    return 2 * case.head_dim * pairs * (7 if case.mode == "forward_backward" else 2)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# --- profile


def profile_case(case: Case, num_operations: int = 8) -> dict[str, Any]:
    """Which of torch's operations a case spends its time in.

    Returns:
        its fields, `seconds` of one run, and `operations`: name → share of the time, the largest, each without what
        it calls.
    """
    from torch.profiler import ProfilerActivity, profile

    run = case.build()
    run()
    activity, field = ProfilerActivity.CPU, "self_cpu_time_total"
    if case.device == "cuda":
        activity, field = ProfilerActivity.CUDA, "self_device_time_total"
    with profile(activities=[activity]) as profiler:
        _time(run, case.device)
    spent = {event.key: getattr(event, field) for event in profiler.key_averages()}
    total, largest = sum(spent.values()), sorted(spent, key=spent.get, reverse=True)[:num_operations]
    return {**asdict(case), "seconds": total / 1e6, "operations": {name: spent[name] / total for name in largest}}


# --- memory


def measure_memory(
    cases: Sequence[Case], base: str, num_threads: int, skipped: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The peak memory of each case in a fresh process, in MiB, and its ratio to that of the base of its length.

    Of an attention kernel, what is taken above its inputs; of a step or an evaluation, what its process takes above the
    libraries.

    Returns:
        a record for each case that ran: its fields, `mib`, `process_mib` with the libraries, `seconds` of one run.
    """
    context, records = multiprocessing.get_context("spawn"), []
    for case in tqdm(cases, desc="memory", leave=False):
        with context.Pool(1) as pool:
            found = pool.apply(_peak_of, (case, num_threads))
        if isinstance(found, str):
            skipped.append({**asdict(case), "reason": found, "measure": "memory"})
        else:
            records.append({**asdict(case), **found})
    bases = {_group(record): record["mib"] for record in records if record["name"] == base}
    for record in records:
        if _group(record) in bases:
            record["ratio"] = record["mib"] / bases[_group(record)]
    return records


def _group(record: dict[str, Any]) -> tuple:
    return record["part"], record["mode"], record["length"], record["batch_size"]


def _peak_of(case: Case, num_threads: int) -> dict[str, float] | str:
    """→ the measured fields of the record, or the reason why the case cannot run."""
    torch.set_num_threads(num_threads)
    try:
        # the memory of the libraries themselves, and of the threads that the first run makes
        replace(case, length=min(case.length, 16), batch_size=1).build()()
        before = _resident_mib(case.device)
        run = case.build()
        if case.part == "attention":
            before = _resident_mib(case.device)
        _reset_peak(case.device)
        seconds = _time(run, case.device)
    except (Unsupported, NotImplementedError, ValueError, RuntimeError) as error:
        return _one_line(error)
    peak = _peak_mib(case.device)
    return {"mib": max(peak - before, 0.0), "process_mib": peak, "seconds": seconds}


def _status(field: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise Unsupported(f"/proc/self/status has no {field}")


def _resident_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.memory_allocated() / 2**20
    return _status("VmRSS:")


def _reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _peak_mib(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return _status("VmHWM:")
