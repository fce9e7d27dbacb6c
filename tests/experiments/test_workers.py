"""Who does which run: places, other calls of the same sweep, workers that die, and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from multiprocessing import get_context

import forked
import pytest
from conftest import ROOT
from helpers import hold

from hf_relpos.experiments import workers
from hf_relpos.experiments.grid import Run
from hf_relpos.experiments.sweep import collect_results
from hf_relpos.experiments.workers import run_here, run_in_processes, schedule
from hf_relpos.processes import InUseError


def make_run(key: str, base: Run | None = None) -> Run:
    return Run("here", {}, {}, base, (), key)


def note(run: Run, root) -> None:
    """A run that takes no time."""
    with (root / "order.txt").open("a") as file:
        file.write(f"{run.key}\n")


def die_once(run: Run, root) -> None:
    """A run whose process is killed the first time; "often" is killed always, "wrong" fails."""
    if run.key == "wrong":
        (run.folder(root) / "failure.txt").write_text("wrong")
        raise ValueError("wrong")
    note(run, root)
    marks = run.folder(root) / "marks"
    marks.mkdir(exist_ok=True)
    if run.key == "often" or (run.key == "once" and not list(marks.iterdir())):
        (marks / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)


def note_slowly(run: Run, root) -> None:
    """A run that is done only once, as `run_one` sees to it."""
    if not (run.folder(root) / "done").exists():
        time.sleep(0.2)
        note(run, root)
        (run.folder(root) / "done").touch()


def wait_for_ctrl_c(run: Run, root) -> None:
    """A run that stops as a training does."""
    signals = []  # no event: its lock would be held where the second of two signals meets the first one's wait
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    note(run, root)
    end = time.monotonic() + 60
    while not signals and time.monotonic() < end:
        time.sleep(0.02)
    (run.folder(root) / "checkpoint").write_text(str(bool(signals)))
    raise KeyboardInterrupt


def note_parent(run: Run, root) -> None:
    """A run that says who started its process, and what it was told."""
    (root / run.key).write_text(f"{os.getppid()} {os.environ.get('TOLD_LATER')}")


def order(root) -> list[str]:
    path = root / "order.txt"
    return path.read_text().split() if path.exists() else []


def test_a_run_of_another_call_is_left_to_it(tmp_path):
    """The others come first; then it is waited for, and what it leaves undone is taken over."""
    runs = [make_run("a"), make_run("b")]
    owner = hold(runs[0].folder(tmp_path), seconds=60)
    threading.Timer(1.5, owner.kill).start()
    assert run_here(runs, tmp_path, note) == []
    assert order(tmp_path) == ["b", "a"] and owner.wait() == -signal.SIGKILL


def test_calls_in_one_folder_share_the_work(tmp_path):
    """Each run is done once, by any of three calls; none fails, and all wait for the last."""
    base = make_run("a")
    runs = [base, make_run("b", base), *map(make_run, "cdefgh")]

    def call() -> None:
        failed = run_here(runs, tmp_path, note_slowly)
        sys.exit(bool(failed) or len(order(tmp_path)) != len(runs))

    calls = [get_context("fork").Process(target=call) for _ in range(3)]
    for each in calls:
        each.start()
    for each in calls:
        each.join(60)
    assert [each.exitcode for each in calls] == [0, 0, 0]
    assert sorted(order(tmp_path)) == list("abcdefgh") and order(tmp_path).index("a") < order(tmp_path).index("b")


def test_results_are_written_by_one_call_at_a_time(tmp_path):
    owner = hold(tmp_path, seconds=1)
    assert collect_results([], tmp_path) == []
    assert owner.wait(1) == 0 and (tmp_path / "results.jsonl").read_text() == ""


def test_what_failed_in_another_call_is_not_tried_again(tmp_path):
    base = make_run("a")
    runs = [base, make_run("b", base), make_run("c")]
    failure = base.folder(tmp_path) / "failure.txt"
    owner = hold(base.folder(tmp_path), seconds=60)

    def fail() -> None:
        failure.write_text("wrong")
        owner.kill()

    threading.Timer(1, fail).start()
    assert run_here(runs, tmp_path, note) == runs[:2] and order(tmp_path) == ["c"]
    assert run_here(runs, tmp_path, note) == []  # a failure of an earlier call
    assert order(tmp_path) == ["c", "a", "b", "c"]


def test_a_run_that_another_call_takes_in_the_same_moment_is_put_back(tmp_path):
    runs, tries = [make_run("a"), make_run("b")], []

    def submit(task, place) -> Future:
        future: Future = Future()
        tries.append(task.args[1].key)
        if tries == ["a"]:
            future.set_exception(InUseError("just taken"))
        else:
            future.set_result(task())
        return future

    assert schedule(runs, tmp_path, note, submit, 1) == []
    assert tries == ["a", "b", "a"] and order(tmp_path) == ["b", "a"]


def test_a_worker_that_dies_is_replaced_and_takes_no_other_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "MAX_RETRIES", 1)
    runs = [make_run(key) for key in ("once", "often", "wrong", "fine")]
    assert {run.key for run in run_in_processes(runs, tmp_path, die_once, 2)} == {"often", "wrong"}
    assert sorted(order(tmp_path)) == sorted(["once"] * 2 + ["often"] * 2 + ["fine"])
    assert "stopped 2 times, at last with exit code -9" in (runs[1].folder(tmp_path) / "failure.txt").read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere each process imports everything itself")
def test_workers_come_from_one_process_that_has_imported_everything(tmp_path, monkeypatch):
    """With the environment of the call, not that of the first one; with GPUs each is a process of its own."""
    for index, gpus in enumerate(([], [], ["0"])):
        monkeypatch.setenv("TOLD_LATER", str(index))
        monkeypatch.setattr(workers, "visible_gpus", lambda gpus=gpus: gpus)
        assert run_in_processes([make_run(f"a{index}")], tmp_path, note_parent, 1) == []
    parents, told = zip(*((tmp_path / f"a{index}").read_text().split() for index in range(3)))
    assert told == ("0", "1", "2")
    assert parents[0] == parents[1] != str(os.getpid()) == parents[2]


CALL = """
import sys
from pathlib import Path
from hf_relpos.experiments.sweep import signals_interrupt
from hf_relpos.experiments.workers import run_in_processes
from test_workers import make_run, wait_for_ctrl_c

if __name__ == "__main__":
    with signals_interrupt():
        run_in_processes([make_run("a"), make_run("b")], Path(sys.argv[1]), wait_for_ctrl_c, 2)
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_workers_stop_in_order_with_the_sweep(send, tmp_path):
    """Whether the signal comes to the sweep alone, or to all of its processes, as from a terminal that closes."""
    script = tmp_path / "call.py"
    script.write_text(CALL)
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "experiments")))
    process = forked.start(
        [script, tmp_path],
        env=os.environ | {"PYTHONPATH": path},
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while len(order(tmp_path)) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    send(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode
    for key in "ab":
        assert (tmp_path / "runs" / key / "checkpoint").read_text() == "True"


@pytest.mark.parametrize(
    ("gpus", "weights", "expected"),
    [([], [3_000_000], 3), ([], [3_000_000, 60_000_000], 1), (["0", "1"], [60_000_000], 2), ([], [], 3)],
)
def test_how_many_runs_at_once(gpus, weights, expected, monkeypatch):
    monkeypatch.setattr(workers, "visible_gpus", lambda: gpus)
    monkeypatch.setattr(workers.torch, "get_num_threads", lambda: 3)
    runs = [Run("here", {}, {}, num_weights=number) for number in weights]
    assert workers.default_num_parallel(runs) == expected


@pytest.mark.parametrize(
    ("named", "count", "expected"),
    [(None, 2, ["0", "1"]), ("", 0, []), ("3,5", 2, ["3", "5"]), ("-1", 0, []), ("0", 0, []), ("2,-1,3", 1, ["2"])],
)
def test_gpus_are_those_that_there_are(named, count, expected, monkeypatch):
    """A user hides all with CUDA_VISIBLE_DEVICES=-1: then runs share the cores as without a GPU."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    monkeypatch.setattr(workers.torch.cuda, "device_count", lambda: count)
    assert workers.visible_gpus() == expected
