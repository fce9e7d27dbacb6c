"""Who does the runs of a sweep: this process, several on this machine, or the tasks of a Ray cluster. A run that
another call of the same sweep does is left to it, and taken over if that call dies."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process, resource_tracker
from pathlib import Path

import torch

from ..cli import describe
from ..processes import InUseError, end_with_parent, is_held, only_owner
from ..training.interrupt import SIGNALS
from .grid import Run
from .progress import FAILURE, write_failure


MAX_PARALLEL, TINY = 4, 10_000_000  # runs at once on a CPU; weights up to which one thread is used best
MAX_RETRIES = 3  # of a run whose worker died
# exit codes of a worker: another call does the run; stopped by a signal; not known, as the server died
IN_USE, INTERRUPTED, LOST = 75, 130, 255
SECONDS = 0.5  # between two looks at the runs of another call

Work = Callable[[Run, Path], None]
Task = Callable[[], None]


def schedule(
    runs: Sequence[Run],
    root: Path,
    work: Work,
    submit: Callable[[Task, int], Future],
    num_places: int,
    watch: Task | None = None,
) -> list[Run]:
    """Starts a run when a place is free, the run that it finetunes is done and no other call does it; → those that
    failed, here or in the other call, with all that start from them.

    Args:
        runs: bases before the runs that start from them.
        root: folder of the sweep.
        work: does a run, or what is left of it.
        submit: starts a task at a place, 0 to `num_places` − 1.
        num_places: how many run at once.
        watch: called now and then, between two runs at least; what it raises ends all.
    """
    waiting, failed, places = list(runs), [], list(range(num_places))
    tasks = {run: partial(_do, work, run, root, _last_failure(run, root)) for run in runs}
    running: dict[Future, tuple[Run, int]] = {}
    while waiting or running:
        for run in list(waiting):
            if run.base in failed:
                waiting.remove(run)
                failed.append(run)
            elif places and _is_ready(run, waiting, running) and not is_held(run.folder(root)):
                waiting.remove(run)
                place = places.pop(0)
                running[submit(tasks[run], place)] = run, place
        if not running:
            time.sleep(SECONDS if waiting else 0)
        if watch is not None:
            watch()
        is_polled = watch is not None or (places and waiting)
        for future in wait(running, SECONDS if is_polled else None, FIRST_COMPLETED).done:
            run, place = running.pop(future)
            places.append(place)
            if isinstance(future.exception(), InUseError):
                waiting.append(run)
            elif (error := future.exception()) is not None:
                failed.append(run)
                if not (run.folder(root) / FAILURE).is_file() and not isinstance(error, WorkerError):
                    print(f"{run.label}: {describe(error)}", file=sys.__stderr__)
    return failed


def _is_ready(run: Run, waiting: Sequence[Run], running: dict[Future, tuple[Run, int]]) -> bool:
    return run.base not in waiting and all(run.base is not other for other, _ in running.values())


def _last_failure(run: Run, root: Path) -> int:
    """When it failed, in nanoseconds; 0 if it did not."""
    with suppress(OSError):
        return (run.folder(root) / FAILURE).stat().st_mtime_ns
    return 0


def _do(work: Work, run: Run, root: Path, last_failure: int) -> None:
    """Does a run, alone. What failed in another call since this one began is not tried again."""
    with only_owner(run.folder(root), "run"):
        if _last_failure(run, root) not in (0, last_failure):
            raise ValueError(f"the run {run.key} failed in another call")
        work(run, root)


def worker_kind(num_parallel: int) -> str:
    """Who does so many runs at once: "here", this process; "forked", processes that a server has imported all for;
    "spawned", processes that import it themselves."""
    if num_parallel == 1:
        return "here"
    return "spawned" if visible_gpus() or sys.platform != "linux" else "forked"


def run_here(runs: Sequence[Run], root: Path, work: Work, watch: Task | None = None) -> list[Run]:
    """Runs all in this process, one after another; → those that failed, with all that start from them. `watch` as in
    `schedule`."""
    if visible_gpus():  # the Trainer would use all of them, with as many times the batch
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_gpus()[0]

    def submit(task: Task, place: int) -> Future:
        future: Future = Future()
        try:
            future.set_result(task())
        except Exception as error:
            future.set_exception(error)
        return future

    return schedule(runs, root, work, submit, 1, watch)


def run_in_processes(
    runs: Sequence[Run], root: Path, work: Work, num_processes: int, watch: Task | None = None
) -> list[Run]:
    """Runs several at once, each in its own process, the GPUs in turn; → those that failed. `watch` as in `schedule`;
    where it raises, all save a checkpoint and stop.

    A process that dies is started again and resumes at the last checkpoint, `MAX_RETRIES` times. All end with this one.

    Raises:
        KeyboardInterrupt: when all have saved a checkpoint and stopped; at the second one they are killed.
    """
    devices, threads = visible_gpus(), max(1, torch.get_num_threads() // num_processes)
    processes = Processes(None if devices else [__name__, work.__module__])
    with ThreadPoolExecutor(num_processes) as pool:

        def submit(task: Task, place: int) -> Future:
            return pool.submit(processes.run, task, devices[place % len(devices)] if devices else None, threads)

        try:
            return schedule(runs, root, work, submit, num_processes, watch)
        except BaseException:
            processes.stop(signal.SIGTERM)
            try:
                pool.shutdown()
            except KeyboardInterrupt:
                processes.stop(signal.SIGKILL)
            raise


class WorkerError(RuntimeError):
    """A run failed in a process that has said why, in failure.txt or on stderr."""


class Processes:
    """A process for each run: a GPU is chosen before torch has seen one, memory goes back when a run is done, and one
    that is killed takes no other with it.

    On Linux they are forked from a server that has imported `modules` once for all runs. Without `modules` each imports
    them itself: a package that asked for GPUs while it was imported would keep all forked processes from using one.
    """

    def __init__(self, modules: list[str] | None) -> None:
        self.living: set = set()
        self.stopping = False
        served = modules is not None and sys.platform == "linux"
        self.context = get_context("forkserver" if served else "spawn")
        if served:
            self.context.set_forkserver_preload(modules)
            resource_tracker.ensure_running()  # whose start unblocks signals

    def run(self, task: Task, device: str | None, num_threads: int) -> None:
        """Does a task in a process, and in another one if that dies.

        Raises:
            InUseError: if another call does the run.
            WorkerError: if it failed.
            RuntimeError: if it died too often.
        """
        for _ in range(MAX_RETRIES + 1):
            code = self._run_once(task, device, num_threads)
            if self.stopping:
                raise CancelledError
            if code == 0:
                return
            if code == IN_USE:
                raise InUseError("another call does the run")
            if code > 0 and code not in (INTERRUPTED, LOST):
                raise WorkerError(f"the run failed with exit code {code}")
        _, run, root, _ = task.args
        reason = f"its process was stopped {MAX_RETRIES + 1} times, at last with exit code {code} (below 0: a signal)"
        with suppress(OSError):
            write_failure(run, root, f"{reason}\n")
        raise RuntimeError(reason)

    def _run_once(self, task: Task, device: str | None, num_threads: int) -> int:
        process = self.context.Process(target=_work, args=(task, device, num_threads, dict(os.environ)))
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # they wait until the process can handle them
        try:
            if self.stopping:
                return INTERRUPTED
            process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.living.add(process)
        if self.stopping:
            process.terminate()
        while process.exitcode is None:
            process.join(1)
        self.living.discard(process)
        return process.exitcode

    def stop(self, number: int) -> None:
        """Sends a signal to all; none is started any more."""
        self.stopping = True
        for process in list(self.living):
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _work(task: Task, device: str | None, num_threads: int, environment: dict[str, str]) -> None:
    """What a process does. One whose parent ended before ends here."""
    end_with_parent()
    if not parent_process().is_alive():
        sys.exit(INTERRUPTED)
    os.environ.update(environment)
    for number in SIGNALS:
        if signal.getsignal(number) == signal.SIG_DFL:  # which would leave behind what the process holds
            signal.signal(number, signal.default_int_handler)
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _run_on(task, device, num_threads)
    except InUseError:
        sys.exit(IN_USE)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except Exception as error:
        _, run, root, _ = task.args
        if not (run.folder(root) / FAILURE).is_file():
            print(f"{run.label}: {describe(error)}", file=sys.__stderr__)
        sys.exit(1)


def _run_on(task: Task, device: str | None, num_threads: int) -> None:
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = device
    torch.set_num_threads(num_threads)
    task()


def run_on_ray(
    runs: Sequence[Run], root: Path, work: Work, cpus_per_run: float = 1, gpus_per_run: float = 0
) -> list[Run]:
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
    remote, references = ray.remote(**options)(_run_on), []
    threads = max(1, int(cpus_per_run))

    def submit(task: Task, place: int) -> Future:
        references.append(remote.remote(task, None, threads))
        return references[-1].future()

    try:
        return schedule(runs, root.resolve(), work, submit, len(runs))
    except KeyboardInterrupt:
        for reference in references:  # as Ctrl-C in each: a checkpoint, then the end
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references))
        raise


def default_num_parallel(runs: Sequence[Run]) -> int:
    """How many runs at once: one on each GPU; without one, as many as threads where all models are tiny (two runs of
    one thread take less time than one after the other with two), else one."""
    tiny = all(run.num_weights <= TINY for run in runs)
    return len(visible_gpus()) or (min(MAX_PARALLEL, torch.get_num_threads()) if tiny else 1)


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them: those before the first one that is not
    there, as -1 is nowhere."""
    named, count = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(index) for index in range(count)]
