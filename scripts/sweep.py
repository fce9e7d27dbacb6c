#!/usr/bin/env python
"""Runs the experiment that a YAML file states, and goes on where an earlier call stopped.

python scripts/sweep.py --experiment experiments/relative_schemes.yaml --output_dir output/relative --scale 0.01
"""

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from hf_relpos.cli import command, parse_arguments
from hf_relpos.environment import write_text
from hf_relpos.experiments.sweep import Run, load_experiment, run_here, run_in_processes, run_on_ray, status


@dataclass
class SweepArguments:
    """Which experiment, where its runs go, and how many run at once."""

    experiment: str = field(metadata={"help": "YAML file with the sections train, grid, finetune and evaluate."})
    output_dir: str = field(metadata={"help": "Folder of the runs; those that are done are not repeated."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the numbers of steps and of evaluation windows."})
    num_parallel: int = field(
        default=1, metadata={"help": "Runs at once, each in a process of its own; GPUs are used in turn."}
    )
    executor: str = field(
        default="local", metadata={"help": "local, or ray: a task for each run on a Ray cluster (extra [ray])."}
    )
    cpus_per_run: float = field(default=1, metadata={"help": "CPUs that a run takes of a Ray cluster."})
    gpus_per_run: float = field(default=0, metadata={"help": "GPUs that a run takes of a Ray cluster."})
    dry_run: bool = field(default=False, metadata={"help": "Print the runs and start none."})


@command
def main() -> None:
    (args,) = parse_arguments((SweepArguments,), __doc__)
    if args.num_parallel < 1:
        raise ValueError(f"`num_parallel` must be at least 1, got {args.num_parallel}.")
    if args.executor not in ("local", "ray"):
        raise ValueError(f"`executor` must be local or ray, got {args.executor!r}.")
    if args.executor == "ray" and args.num_parallel != 1:
        raise ValueError("`num_parallel` is for the executor local: a Ray cluster runs as many as it has room for.")
    runs, root = load_experiment(args.experiment, args.scale), Path(args.output_dir)
    if args.dry_run:
        for run in runs:
            print(f"{run.key}  {run.label}: {status(run, root)['state']}")
        return
    todo = [run for run in runs if status(run, root)["state"] != "done"]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done before")
    with live_table(runs, root):
        if args.executor == "ray":
            failed = run_on_ray(todo, root, args.cpus_per_run, args.gpus_per_run)
        elif args.num_parallel == 1:
            failed = run_here(todo, root)
        else:
            failed = run_in_processes(todo, root, args.num_parallel)
    for run in failed:
        print(f"failed: {run.label}, see {run.folder(root)}/failure.txt", file=sys.stderr)
    results = [str(run.result(root).relative_to(root)) for run in runs if run.result(root).is_file()]
    write_text(root / "results.txt", "\n".join(results) + "\n")
    print(f"{len(results)} of {len(runs)} results, listed in {root / 'results.txt'}")
    if failed:
        sys.exit(1)


@contextmanager
def live_table(runs: list[Run], root: Path, seconds: float = 1.0) -> Iterator[None]:
    """Shows the state of all runs while the body runs; where there is no terminal, a line for each change."""
    console, stop, begun = Console(file=sys.__stderr__), threading.Event(), time.time()

    def follow() -> None:
        if console.is_terminal:
            with Live(_table(runs, root, begun), console=console, auto_refresh=False) as live:
                while not stop.wait(seconds):
                    live.update(_table(runs, root, begun), refresh=True)
                live.update(_table(runs, root, begun), refresh=True)
            return
        seen: dict[str, str] = {}
        while True:
            ended = stop.wait(seconds)
            for run in runs:
                state = status(run, root, begun)["state"]
                if state != seen.get(run.key, "waiting"):
                    console.print(f"{run.key}  {run.label}: {state}", highlight=False)
                seen[run.key] = state
            if ended:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _table(runs: list[Run], root: Path, begun: float) -> Table:
    """Runs that are at work or failed, and how many there are of the others."""
    found = [(run, status(run, root, begun)) for run in runs]
    counts = Counter(state["state"] for _, state in found)
    title = ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + _time_left(found, root, begun)
    table = Table("run", "state", "step", "loss", "left", title=title)
    for run, state in found:
        if state["state"] in ("done", "waiting"):
            continue
        loss, left = state.get("loss"), state.get("seconds_left")
        table.add_row(
            f"{run.key} {run.label}",
            state["state"],
            f"{state['step']}/{state['steps']}" if "step" in state else "",
            "" if loss is None else f"{loss:.3f}",
            "" if left is None or state["state"] != "training" else f"{int(left // 60)}:{int(left % 60):02d}",
        )
    return table


def _time_left(found: list[tuple[Run, dict]], root: Path, begun: float) -> str:
    """How long the runs that are left take at the pace of those that ended since `begun`; empty before the first."""
    ended = sum(state["state"] == "done" and run.result(root).stat().st_mtime >= begun for run, state in found)
    left = sum(state["state"] in ("waiting", "training", "evaluating") for _, state in found)
    if not ended or not left:
        return ""
    minutes = (time.time() - begun) / ended * left / 60
    return f"; about {minutes / 60:.1f} hours left" if minutes > 90 else f"; about {minutes:.0f} minutes left"


if __name__ == "__main__":
    main()
