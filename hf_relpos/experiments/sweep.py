"""Sweeps: the runs of an experiment, one after another, in several processes or on a Ray cluster, each only once."""

import shutil
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

from ..cli import import_schemes, parse_values, say_next
from ..environment import check_at_least_1, write_json
from ..evaluation.evaluate import evaluate_model
from ..processes import only_owner
from ..results.comparable import fields_to_vary
from ..results.result_file import RESULTS, read_readable, split_name, write_results
from ..results.training_record import TRAINING_RECORD
from ..training.checkpoints import damage
from ..training.interrupt import SIGNALS
from ..training.output_stream import SafeStream
from ..training.train import finetune, train
from .commands import SweepArguments
from .grid import EVALUATE_TYPES, FINETUNE_TYPES, TRAIN_TYPES, Run, load_experiment
from .progress import FAILURE, LOG, PROGRESS, ProgressCallback, failure_of, labels, live_table, status, write_failure
from .workers import default_num_parallel, run_here, run_in_processes, run_on_ray


# --- one run


def run_one(run: Run, root: Path) -> None:
    """Trains a model, from its last checkpoint if it was interrupted, and evaluates it. What is done is kept.

    Everything that it prints goes to log.txt in the run's folder.

    Raises:
        whatever training or evaluation raise; the traceback is kept in failure.txt.
    """
    folder = run.folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).unlink(missing_ok=True)
    with open_log(folder / LOG) as log, redirect_stdout(log), redirect_stderr(log):
        try:
            import_schemes(run.import_files)
            if not (folder / TRAINING_RECORD).is_file():
                _train(run, root)
            for part in folder.glob("checkpoint-*"):  # of this call, or of one that was killed here
                shutil.rmtree(part)
            if not run.result(root).is_file():
                values = {
                    **run.evaluation,
                    "model_name_or_path": str(folder),
                    "output_dir": str(run.result(root).parent),
                }
                evaluate_model(*parse_values(EVALUATE_TYPES, values))
        except Exception:
            with suppress(OSError):  # a full disk: whoever called says why
                write_failure(run, root, traceback.format_exc())
            raise


@contextmanager
def open_log(path: Path) -> Iterator[SafeStream]:
    """A file to print to; what does not fit on the disk is lost, which is no reason to stop."""
    with path.open("a", encoding="utf-8") as file:
        log = SafeStream(file)
        try:
            yield log
        finally:
            log.flush()


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
    else:  # killed while it saved a model that had no checkpoint
        for part in folder.glob("*.json"):
            part.unlink()
    callbacks = [ProgressCallback(folder / "run" / PROGRESS)]
    if run.base is None:
        train(*parse_values(TRAIN_TYPES, values), callbacks=callbacks)
    else:
        values["model_name_or_path"] = str(run.base.folder(root))
        finetune(*parse_values(FINETUNE_TYPES, values), callbacks=callbacks)


# --- all runs


def collect_results(runs: Sequence[Run], root: Path) -> list[dict[str, Any]]:
    """Writes the results of all runs that are done to `results.jsonl`, in the order of the experiment; → these."""
    with only_owner(root, seconds=-1):  # another call may be writing them
        results, errors = read_readable(run.result(root) for run in runs if run.result(root).is_file())
        write_results(root / RESULTS, results)
    for error in errors:
        print(f"left out: {error}", file=sys.stderr)
    return results


def _run_all(runs: Sequence[Run], root: Path, args: SweepArguments) -> list[Run]:
    """→ those that failed."""
    if args.executor == "ray":
        return run_on_ray(runs, root, run_one, args.cpus_per_run, args.gpus_per_run)
    num_parallel = min(args.num_parallel or default_num_parallel(runs), max(1, len(runs)))
    if num_parallel == 1:
        return run_here(runs, root, run_one)
    return run_in_processes(runs, root, run_one, num_parallel)


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal do what Ctrl-C does, while the body runs."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    ignored = signal.SIG_IGN, None  # by nohup, or by what is no Python
    before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) not in ignored}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sweep(args: SweepArguments) -> None:
    """Does the runs of an experiment that are not done, and writes their results; exit code 1 if one fails."""
    check_at_least_1("num_parallel", args.num_parallel)
    if args.executor not in ("local", "ray"):
        raise ValueError(f"`executor` must be local or ray, got {args.executor!r}.")
    for name in ("cpus_per_run", "gpus_per_run"):
        if args.executor == "local" and getattr(args, name) != getattr(SweepArguments, name):
            raise ValueError(f"`{name}` is for the executor ray, got the executor local.")
    if args.executor == "ray" and args.num_parallel not in (None, 1):
        raise ValueError("`num_parallel` is for the executor local: a Ray cluster runs as many as it has room for.")
    runs, root = load_experiment(args.experiment, args.scale), Path(args.output_dir)
    names = labels(runs)
    if args.dry_run:
        for run in runs:
            print(f"{run.key}  {names[run]}: {status(run, root)['state']}")
        return
    todo = [run for run in runs if status(run, root)["state"] != "done"]
    print(f"{len(runs)} runs, {len(runs) - len(todo)} of them done before", flush=True)
    with only_owner(root, seconds=-1):  # where nothing can be written no run is started
        pass
    with signals_interrupt(), live_table(runs, root, names=names):
        failed = _run_all(todo, root, args)
    for run in failed:
        print(f"failed: {names[run]}: {failure_of(run, root) or 'see above'}", file=sys.stderr)
    results = collect_results(runs, root)
    texts = "; ".join(dict.fromkeys(map(split_name, results)))
    print(f"{len(results)} of {len(runs)} results, in {root / RESULTS}" + (f": {texts}" if texts else ""))
    if failed:
        sys.exit(1)
    with suppress(ValueError):  # results of several corpora make no report
        say_next("report", sweep=root, output_dir=root / "report", varied=fields_to_vary(results))
