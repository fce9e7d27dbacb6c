"""How far the runs of a sweep are: what each writes while it trains, and the table or the lines made from it."""

import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from transformers import TrainerCallback

from ..environment import write_json, write_text
from ..file_reading import MAX_REASON
from ..messages import time_text
from ..results.training_record import TRAINING_RECORD
from ..training.arguments import FinetuningArguments, RelPosTrainingArguments
from .grid import Run


PROGRESS, FAILURE, LOG = "progress.json", "failure.txt", "log.txt"
ACTIVE = ("training", "evaluating")
SHORT = {"learning_rate": "lr"}
WARM_UP = 5  # steps of a run after which they are timed
Found = Sequence[tuple[Run, dict[str, Any]]]  # runs, and what `status` says of each
Summary = Callable[[Found], str]


class ProgressCallback(TrainerCallback):
    """Writes the step and the loss to a file, which the table of the sweep is made from."""

    def __init__(self, path: Path) -> None:
        self.path, self.written, self.begun, self.first_step = path, 0.0, time.time(), 0
        self.warm: float | None = None  # when the steps to warm up were done
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begun, self.first_step = time.time(), state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.loss = (logs or {}).get("loss", self.loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, done = time.time(), state.global_step - self.first_step
        self.warm = now if done == WARM_UP else self.warm
        if now - self.written < 0.5 and state.global_step < state.max_steps:
            return
        left = (now - self.begun) / max(done, 1) * (state.max_steps - state.global_step)
        progress = {"step": state.global_step, "steps": state.max_steps, "loss": self.loss, "seconds_left": left}
        progress |= {"first_step": self.first_step, "pid": os.getpid()}
        if self.warm is not None:
            progress |= {"timed_steps": done - WARM_UP, "timed_seconds": now - self.warm}
        with suppress(OSError):  # a full disk stops a run where it saves, not where it is watched
            write_json(self.path, progress)
        self.written = now


def status(run: Run, root: Path, since: float = 0.0) -> dict[str, Any]:
    """What a run has left in its folder.

    Args:
        run: any run of the sweep.
        root: folder of the sweep.
        since: seconds of the epoch; progress and failures written earlier are those of another call.

    Returns:
        `state` ("waiting", "training", "evaluating", "done" or "failed"); `step`, `steps`, `loss`, `seconds_left`,
        `first_step` (the one that it was resumed from, or 0), `timed_steps` and `timed_seconds` (those after the first
        five) and `pid` as the run last wrote them.
    """
    folder, progress = run.folder(root), {}
    with suppress(OSError, json.JSONDecodeError):
        path = folder / "run" / PROGRESS
        if path.stat().st_mtime >= since:
            progress = json.loads(path.read_text(encoding="utf-8"))
    if run.result(root).is_file():
        state = "done"
    elif _written_since(folder / FAILURE, since):
        state = "failed"
    elif (folder / TRAINING_RECORD).is_file():
        state = "evaluating"
    else:
        state = "training" if progress else "waiting"
    return {"state": state, **progress}


def _written_since(path: Path, since: float) -> bool:
    try:
        return path.stat().st_mtime >= since
    except OSError:
        return False


def write_failure(run: Run, root: Path, text: str) -> None:
    """Keeps why a run failed, whole or not at all; raises `OSError` where nothing can be written."""
    write_text(run.folder(root) / FAILURE, text)


def failure_of(run: Run, root: Path) -> str:
    """Why a run failed, in a few words, and where the traceback is; empty where nothing could be written."""
    path = run.folder(root) / FAILURE
    if not path.is_file():
        return ""
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return f"{lines[-1].strip()[:MAX_REASON] if lines else 'stopped'}; see {path}"


@contextmanager
def live_table(
    runs: Sequence[Run],
    root: Path,
    seconds: float = 1.0,
    seconds_per_line: float = 30.0,
    console: Any = None,
    summary: Summary | None = None,
    remark: Callable[[Found], str] = lambda found: "",
    names: dict[Run, str] | None = None,
) -> Iterator[None]:
    """Shows the state of all runs while the body runs.

    Args:
        runs, root: of the sweep.
        seconds: between two looks at the folders of the runs.
        seconds_per_line: where there is no terminal, a change of a run's state is a line, and so is each active run
            once in so many seconds, with the time that all take.
        console: of rich, by default on stderr.
        summary: runs and what `status` says of them → a line about all; by default how many are in which state.
        remark: the same → a line to say now, or nothing.
        names: what to call the runs, by default as `labels` does.
    """
    begun = time.time()
    watch = _Watch(
        runs=runs,
        root=root,
        begun=begun,
        console=console or Console(file=sys.__stderr__, soft_wrap=True),
        summary=summary or partial(_summary, root=root, begun=begun),
        remark=remark,
        names=names or labels(runs),
    )
    stop = threading.Event()
    if watch.console.is_terminal:
        thread = threading.Thread(target=watch.redraw, args=(stop, seconds), daemon=True)
    else:
        thread = threading.Thread(target=watch.print_lines, args=(stop, seconds, seconds_per_line), daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@dataclass
class _Watch:
    """What `live_table` shows, until an event is set; each look at the folders serves all that is said of it."""

    runs: Sequence[Run]
    root: Path
    begun: float
    console: Any
    summary: Summary
    remark: Callable[[Found], str]
    names: dict[Run, str]
    told: dict[str, set[str]] = field(default_factory=lambda: {"runs": set(), "warnings": set()})

    def redraw(self, stop: threading.Event, seconds: float) -> None:
        """On a terminal: a table in its place."""
        table = _table(self._look(), self.summary, self.names)
        with Live(table, console=self.console, auto_refresh=False) as live:
            ended = False
            while not ended:
                ended = stop.wait(seconds)
                found = self._look()
                if not ended:
                    self._tell_warnings(found)
                live.update(_table(found, self.summary, self.names), refresh=True)
                if not ended:
                    self._say_remark(found)

    def print_lines(self, stop: threading.Event, seconds: float, seconds_per_line: float) -> None:
        """Elsewhere: lines."""
        seen: dict[str, str] = {}
        said, ended = time.time(), False
        while not ended:
            ended = stop.wait(seconds)
            due = time.time() - said >= seconds_per_line and not ended
            found = self._look()
            for run, state in found:
                changed = state["state"] != seen.get(run.key, "waiting")
                if changed or (due and state["state"] in ACTIVE):
                    words = [state["state"], *filter(None, _numbers(state))]
                    self._print(f"{run.key}  {self.names[run]}: {', '.join(words)}")
                seen[run.key] = state["state"]
            self._tell_warnings(found)
            if due:
                self._print(self.summary(found))
                self._say_remark(found)
                said = time.time()

    def _look(self) -> Found:
        return [(run, status(run, self.root, self.begun)) for run in self.runs]

    def _print(self, line: str) -> None:
        self.console.print(line, highlight=False)

    def _say_remark(self, found: Found) -> None:
        if line := self.remark(found):
            self._print(line)

    def _tell_warnings(self, found: Found) -> None:
        """Prints what the logs of runs that take steps warn of, once for all runs that are warned of the same."""
        for run, state in found:
            if "step" not in state or run.key in self.told["runs"]:
                continue
            self.told["runs"].add(run.key)
            with suppress(OSError):
                lines = (run.folder(self.root) / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
                for line in dict.fromkeys(lines):
                    if line.startswith("warning: ") and line not in self.told["warnings"]:
                        self.told["warnings"].add(line)
                        self._print(f"{run.key}  {self.names[run]}: {line}")


def progress_table(runs: Sequence[Run], root: Path, begun: float) -> Table:
    """The runs that are active or failed, and how many there are in each state."""
    found = [(run, status(run, root, begun)) for run in runs]
    return _table(found, partial(_summary, root=root, begun=begun), labels(runs))


def _table(found: Found, summary: Summary, names: dict[Run, str]) -> Table:
    table = Table("run", "state", "step", "loss", "left", title=summary(found))
    for run, state in found:
        if state["state"] not in ("done", "waiting"):
            step, loss, left = _numbers(state)
            cells = step.removeprefix("step "), loss.removeprefix("loss "), left.removesuffix(" left")
            table.add_row(f"{run.key} {names[run]}", state["state"], *cells)
    return table


def _numbers(state: dict[str, Any]) -> tuple[str, str, str]:
    """Step, loss and time left in words, each empty where there is none."""
    loss, left = state.get("loss"), state.get("seconds_left")
    return (
        f"step {state['step']}/{state['steps']}" if "step" in state else "",
        "" if loss is None else f"loss {loss:.3f}",
        "" if left is None or state["state"] != "training" else f"{time_text(left)} left",
    )


def labels(runs: Sequence[Run]) -> dict[Run, str]:
    """What to call each run: those of one label also by the settings in which they differ."""
    alike: dict[str, list[Run]] = {}
    for run in runs:
        alike.setdefault(run.label, []).append(run)
    found = {}
    for label, group in alike.items():
        names = dict.fromkeys(name for run in group for name in run.settings)
        differing = [name for name in names if len({str(run.settings.get(name)) for run in group}) > 1]
        for run in group:
            words = [f"{SHORT.get(name, name)} {run.settings.get(name)}" for name in differing]
            found[run] = ", ".join([label, *words])
    return found


def _summary(found: Found, root: Path, begun: float) -> str:
    counts = Counter(state["state"] for _, state in found)
    return ", ".join(f"{count} {state}" for state, count in sorted(counts.items())) + _time_left(found, root, begun)


def _time_left(found: Found, root: Path, begun: float) -> str:
    """How long the steps that are left take at the pace of those since `begun`; empty before the first."""
    taken = left = 0
    for run, state in found:
        steps = max(1, state.get("steps") or _max_steps(run))
        if state["state"] == "done" and _written_since(run.result(root), begun):
            taken += steps - state.get("first_step", 0)
        elif state["state"] in ACTIVE and "step" in state:
            taken += state["step"] - state["first_step"]
        if state["state"] in ("training", "waiting"):
            left += steps - state.get("step", 0)
    if taken < 1 or left < 1:
        return ""
    return f"; about {time_text((time.time() - begun) / taken * left)} left"


def _max_steps(run: Run) -> int:
    return run.settings.get("max_steps", (FinetuningArguments if run.base else RelPosTrainingArguments).default_steps)
