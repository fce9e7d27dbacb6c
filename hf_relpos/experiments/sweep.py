"""Sweeps: the runs of an experiment, one after another, in several processes or on a Ray cluster, each only once."""

import json
import os
import shutil
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import TrainerCallback

from ..cli import command, import_schemes, parse_arguments, parse_values
from ..environment import write_json
from ..evaluation.evaluate import evaluate_model
from ..results.result_file import RESULTS, read_readable, split_name, write_results
from ..results.training_record import TRAINING_RECORD
from ..training.checkpoints import damage
from ..training.train import finetune, train
from .grid import EVALUATE_TYPES, FINETUNE_TYPES, TRAIN_TYPES, Run, load_experiment


DESCRIPTION = """\
Runs the experiment that a YAML file states, and continues where an earlier call stopped.

hf-relpos sweep --experiment experiments/relative_schemes.yaml --output_dir output/relative --scale 0.01
"""
MAX_RETRIES = 3  # of a run whose worker died
PROGRESS, FAILURE, LOG = "progress.json", "failure.txt", "log.txt"


# --- one run


class ProgressCallback(TrainerCallback):
    """Writes the step and the loss to a file, which the table of the sweep is made from."""

    def __init__(self, path: Path) -> None:
        self.path, self.written, self.begun, self.first_step = path, 0.0, time.time(), 0
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, done = time.time(), state.global_step - self.first_step
        if now - self.written < 0.5 and state.global_step < state.max_steps:
            return
        left = (now - self.begun) / max(done, 1) * (state.max_steps - state.global_step)
        progress = {"step": state.global_step, "steps": state.max_steps, "loss": self.loss, "seconds_left": left}
        progress["pid"] = os.getpid()
        write_json(self.path, progress)
        self.written = now


def run_one(run: Run, root: Path) -> None:
    """Trains a model, from its last checkpoint if it was interrupted, and evaluates it. What is done is kept.

    Everything that it prints goes to log.txt in the run's folder.

    Raises:
        whatever training or evaluation raise; the traceback is kept in failure.txt.
    """
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    with (folder / LOG).open("a", encoding="utf-8") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            import_schemes(run.import_files)
            if not (folder / TRAINING_RECORD).is_file():
                _train(run, root)
            if not run.result(root).is_file():
                values = {
                    **run.evaluation,
                    "model_name_or_path": str(folder),
                    "output_dir": str(run.result(root).parent),
                }
                evaluate_model(*parse_values(EVALUATE_TYPES, values))
        except Exception:
            (folder / FAILURE).write_text(traceback.format_exc(), encoding="utf-8")
            raise


def _train(run: Run, root: Path) -> None:
    folder = run.folder(root)
    write_json(folder / "run" / "settings.json", {"label": run.label, "key": run.key, "settings": run.settings})
    for part in folder.glob("checkpoint-*"):
        if damage(part):  # the run was killed while it was being written
            shutil.rmtree(part)
    values = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_total_limit": 1,
        **run.settings,
        "output_dir": str(folder),
    }
    if any(folder.glob("checkpoint-*")):
        values["resume_from_checkpoint"] = "last"
    callbacks = [ProgressCallback(folder / "run" / PROGRESS)]
    if run.base is None:
        train(*parse_values(TRAIN_TYPES, values), callbacks=callbacks)
    else:
        values["model_name_or_path"] = str(run.base.folder(root))
        finetune(*parse_values(FINETUNE_TYPES, values), callbacks=callbacks)
    for part in folder.glob("checkpoint-*"):
        shutil.rmtree(part)


# --- all runs


def status(run: Run, root: Path, since: float = 0.0) -> dict[str, Any]:
    """What a run has left in its folder.

    Args:
        run: any run of the sweep.
        root: folder of the sweep.
        since: seconds of the epoch; progress written earlier is that of a run that was killed.

    Returns:
        `state` ("waiting", "training", "evaluating", "done" or "failed"); `step`, `steps`, `loss`, `seconds_left` and
        `pid` as the run last wrote them.
    """
    folder, progress = run.folder(root), {}
    with suppress(OSError, json.JSONDecodeError):
        path = folder / "run" / PROGRESS
        if path.stat().st_mtime >= since:
            progress = json.loads(path.read_text(encoding="utf-8"))
    if run.result(root).is_file():
        state = "done"
    elif (folder / FAILURE).is_file():
        state = "failed"
    elif (folder / TRAINING_RECORD).is_file():
        state = "evaluating"
    else:
        state = "training" if progress else "waiting"
    return {"state": state, **progress}


def run_here(runs: Sequence[Run], root: Path) -> list[Run]:
    """Runs all in this process, one after another; → those that failed, with all that start from them."""
    failed: list[Run] = []
    if visible_gpus():  # the Trainer would use all of them, with as many times the batch
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[0]
    for run in runs:
        try:
            if run.base in failed:
                raise ValueError(f"the run that it starts from failed: {run.base.key}")
            run_one(run, root)
        except Exception:
            failed.append(run)
    return failed


def run_in_processes(runs: Sequence[Run], root: Path, num_processes: int) -> list[Run]:
    """Runs several at once, each in its own process, the GPUs in turn; → those that failed."""
    devices, threads = visible_gpus(), max(1, torch.get_num_threads() // num_processes)
    # a process for each run: a GPU is chosen before torch has seen one, and memory goes back when a run is done
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:

        def submit(run: Run, place: int) -> Future:
            return pool.submit(_run_on, run, root, devices[place % len(devices)] if devices else None, threads)

        return schedule(runs, submit, num_processes)


def run_on_ray(runs: Sequence[Run], root: Path, cpus_per_run: float, gpus_per_run: float) -> list[Run]:
    """Runs all as tasks of a Ray cluster, as many at once as it has room for; → those that failed.

    The cluster is the one that RAY_ADDRESS names or that runs here, or else one that is started here. All its machines
    must see `root` and the text files under the same paths. A task whose worker dies is started again and resumes at
    its last checkpoint.

    Raises:
        ValueError: if Ray is not installed, or if no machine of the cluster has room for a run.
    """
    try:
        import ray
    except ImportError as error:
        raise ValueError('`executor` "ray" needs Ray: pip install -c constraints.txt -e ".[ray]"') from error
    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    need = {"CPU": cpus_per_run, "GPU": gpus_per_run}
    if not any(all(node["Resources"].get(name, 0) >= n for name, n in need.items()) for node in ray.nodes()):
        raise ValueError(f"`cpus_per_run`, `gpus_per_run`: no machine of the cluster has {need}.")
    options = {"num_cpus": cpus_per_run, "num_gpus": gpus_per_run, "max_retries": MAX_RETRIES}
    task = ray.remote(**options)(_run_on)
    threads = max(1, int(cpus_per_run))
    return schedule(runs, lambda run, place: task.remote(run, root.resolve(), None, threads).future(), len(runs))


def schedule(runs: Sequence[Run], submit: Callable[[Run, int], Future], num_places: int) -> list[Run]:
    """Starts a run when a place is free and the run that it finetunes is done; → those that failed.

    Args:
        runs: bases before the runs that start from them.
        submit: starts a run at a place, 0 to `num_places` − 1.
        num_places: how many run at once.
    """
    waiting, failed, places = list(runs), [], list(range(num_places))
    running: dict[Future, tuple[Run, int]] = {}
    while waiting or running:
        for run in list(waiting):
            if run.base in failed:
                waiting.remove(run)
                failed.append(run)
            elif places and run.base not in waiting and all(run.base is not other for other, _ in running.values()):
                waiting.remove(run)
                place = places.pop(0)
                running[submit(run, place)] = run, place
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run, place = running.pop(future)
            places.append(place)
            if future.exception() is not None:
                failed.append(run)
    return failed


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]


def _run_on(run: Run, root: Path, device: str | None, num_threads: int) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(num_threads)
    run_one(run, root)


def collect_results(runs: Sequence[Run], root: Path) -> list[dict[str, Any]]:
    """Writes the results of all runs that are done to `results.jsonl`, in the order of the experiment; → these."""
    results, errors = read_readable(run.result(root) for run in runs if run.result(root).is_file())
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    write_results(root / RESULTS, results)
    return results


# --- the table of states


@contextmanager
def live_table(runs: Sequence[Run], root: Path, seconds: float = 1.0) -> Iterator[None]:
    """Shows the state of all runs while the body runs; where there is no terminal, a line for each change."""
    console, stop, begun = Console(file=sys.__stderr__), threading.Event(), time.time()

    def follow() -> None:
        if console.is_terminal:
            with Live(progress_table(runs, root, begun), console=console, auto_refresh=False) as live:
                while not stop.wait(seconds):
                    live.update(progress_table(runs, root, begun), refresh=True)
                live.update(progress_table(runs, root, begun), refresh=True)
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


def progress_table(runs: Sequence[Run], root: Path, begun: float) -> Table:
    """The runs that are active or failed, and how many there are in each state."""
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


# --- the command


@dataclass
class SweepArguments:
    """Which experiment, where its runs go, and how many run at once."""

    experiment: str = field(metadata={"help": "YAML file with the sections train, grid, finetune and evaluate."})
    output_dir: str = field(metadata={"help": "Folder of the runs; those that are done are not repeated."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the numbers of steps and of evaluation windows."})
    num_parallel: int = field(
        default=1, metadata={"help": "Runs at once, each in its own process; GPUs are used in turn."}
    )
    executor: str = field(
        default="local", metadata={"help": "local, or ray: a task for each run on a Ray cluster (extra [ray])."}
    )
    cpus_per_run: float = field(default=1, metadata={"help": "CPUs that a run takes of a Ray cluster."})
    gpus_per_run: float = field(default=0, metadata={"help": "GPUs that a run takes of a Ray cluster."})
    dry_run: bool = field(default=False, metadata={"help": "Print the runs and start none."})


@command
def main() -> None:
    (args,) = parse_arguments((SweepArguments,), DESCRIPTION)
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
        print(f"failed: {run.label}, see {run.folder(root)}/{FAILURE}", file=sys.stderr)
    results = collect_results(runs, root)
    texts = "; ".join(dict.fromkeys(map(split_name, results)))
    print(f"{len(results)} of {len(runs)} results, in {root / RESULTS}" + (f": {texts}" if texts else ""))
    if failed:
        sys.exit(1)
