"""What programs say besides their results: time in words, how far they are, and the command that comes next.

Of several processes the first one speaks alone.
"""

import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

from .environment import is_first_process


MEASURED = 3.0  # seconds after the first update before a time is told
SLOW = 10.0  # seconds of the first update from which a time is told by it alone
PER_LINE = 30.0  # seconds between two lines where there is no terminal
LONG = 1800  # seconds from which a shorter way is offered


def time_text(seconds: float) -> str:
    """Seconds in words, rounded up: "7 min"."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{math.ceil(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def exact_time_text(seconds: float) -> str:
    """Seconds in words, so that sums and differences of them agree: "63 s", "7 min 3 s", "2 h 5 min"."""
    total = round(seconds)
    if total < 90:
        return f"{total} s"
    minutes, seconds = divmod(total, 60)
    if minutes < 90:
        return f"{minutes} min" + (f" {seconds} s" if seconds else "")
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


def say_command(words: Iterable[object]) -> None:
    """`next: ` and the command, as a shell takes it, on stderr: it is advice, not output."""
    if is_first_process():
        sys.stdout.flush()
        print(f"next: {shlex.join(_plain_path(str(word)) for word in words)}", file=sys.stderr, flush=True)


def _plain_path(word: str) -> str:
    """A path without empty parts, `a//b`; other words as they are."""
    return os.path.normpath(word) if "//" in word and os.path.exists(word) else word


def this_command(without: Sequence[str], *more: str) -> list[str]:
    """The command that this process runs, without some flags and their values, and with further words."""
    program, *words = sys.argv
    # a script needs its Python before it
    start = program.split(" ") if program.startswith("hf-relpos") else sys.orig_argv[: -len(words) or None]
    kept, skips = [], False
    for word in words:
        if skips and not word.startswith("--"):  # the value of the flag
            skips = False
            continue
        flag, equals, _ = word.partition("=")
        flag = f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag  # one may write --dry-run
        skips = flag in without and not equals
        if flag not in without:
            kept.append(word)
    return [*start, *kept, *more]


class Progress:
    """How far a loop is: a bar in a terminal or a notebook, elsewhere a line every half minute.

    A line says how long all of it takes as soon as some seconds of it were measured, the first update left out, which
    warms up; where the first one is slow, or is nearly all that there is, a line goes by that. Without a terminal what
    takes less is not told at all.

    Args:
        total: how many there are.
        what: what they are, with the unit first: "windows of 1,024 tokens".
        task: what is done with them: "Evaluating".
        shorter: number of them → how to do only so many, for what takes long.
        long: seconds from which that is said.
        initial: how many were done before.
        extra: seconds per one → seconds that all take besides.
        file: where lines go, stderr by default.
        only_time: say nothing but the time that it takes: something else shows how far it is.
        stays: whether the bar of a terminal is still there at the end.
    """

    def __init__(
        self,
        total: int,
        what: str,
        task: str,
        shorter: Callable[[int], str] | None = None,
        long: float = LONG,
        initial: int = 0,
        extra: Callable[[float], float] = lambda seconds: 0.0,
        file: Any = None,
        only_time: bool = False,
        stays: bool = True,
    ) -> None:
        self.total, self.what, self.task, self.extra, self.file = total, what, task, extra, file
        self.only_time = only_time
        self.shorter, self.long = shorter, long
        self.speaks, self.count = is_first_process(), initial
        self.begun = self.said = time.monotonic()
        self.warm: tuple[int, float] | None = None
        self.estimated = False
        self.bar: Any = None
        if self.speaks and not only_time and (sys.stderr.isatty() or _is_notebook()):
            from tqdm.auto import tqdm  # after the environment said how often a bar may be drawn

            unit = self.unit.removesuffix("s")
            self.bar = tqdm(total=total, initial=initial, desc=task, unit=unit, dynamic_ncols=True, leave=stays)

    @property
    def unit(self) -> str:
        """ "steps" """
        return self.what.split()[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, count: int = 1, note: Callable[[], str] | None = None) -> None:
        """So many more are done.

        Args:
            count: how many.
            note: makes a few words about the last of them; called when it is shown.
        """
        self.count += count
        if not self.speaks:
            return
        now = time.monotonic()
        if self.warm is None:
            self.warm = self.count, now
            self._tell_time_by_the_first(now - self.begun, count)
        elif not self.estimated and now - self.warm[1] >= MEASURED:
            self.estimated = True
            self._tell_time(self.seconds_each())
        if self.bar is not None:
            if note and now - self.said >= 1:
                self.said = now
                self.bar.set_postfix_str(note(), refresh=False)
            self.bar.update(count)
        elif now - self.said >= PER_LINE and self.count < self.total and not self.only_time:
            self.write(f"{self.task}: {', '.join(filter(None, [self.place(), note and note(), self.left()]))}")

    def leave_out(self, seconds: float) -> None:
        """What took so long just now was something else."""
        self.begun += seconds
        if self.warm is not None:
            self.warm = self.warm[0], self.warm[1] + seconds

    def place(self) -> str:
        """ "50/10,000 steps" """
        return f"{self.count:,}/{self.total:,} {self.unit}"

    def left(self) -> str:
        """ "about 7 min left"; empty before it is known."""
        left = self.total - self.count
        return f"about {time_text(left * self.seconds_each())} left" if self.estimated and left else ""

    def seconds_each(self) -> float:
        """Of those after the first update; 0 before they are known."""
        if self.warm is None or self.count == self.warm[0]:
            return 0.0
        return (time.monotonic() - self.warm[1]) / (self.count - self.warm[0])

    def write(self, line: str) -> None:
        """A line, above the bar if there is one."""
        if self.speaks:
            self.said = time.monotonic()
            file = self.file or sys.stderr
            if self.bar is not None:
                self.bar.write(line, file=file)
            else:
                print(line, file=file, flush=True)

    def close(self) -> None:
        """The bar stays as it is; without one, the last line."""
        if self.bar is not None:
            self.bar.close()
        elif self.speaks and self.estimated and self.count >= self.total and not self.only_time:
            self.write(f"{self.task}: {self.place()} in {time_text(time.monotonic() - self.begun)}")
        self.speaks, self.bar = False, None

    def _tell_time_by_the_first(self, seconds: float, count: int) -> None:
        """Where nobody would want to wait for the second, or where the others do not take long enough to be timed."""
        each = seconds / max(1, count)
        is_nearly_all = (self.total - self.count) * each < MEASURED and self.extra(each) >= PER_LINE
        if seconds >= SLOW or is_nearly_all:
            self._tell_time(each, "first one, which may be slower than the others")

    def _tell_time(self, each: float, measured: str = "first ones") -> None:
        left, extra = self.total - self.count, self.extra(each)
        if left < 1 and extra < PER_LINE:
            return
        seconds = left * each + extra
        more = f"{left:,} more {self.what}" if left else "what comes after them"
        line = f"about {time_text(seconds)} for {more}, at the speed of the {measured}"
        affordable = int(self.long / each)
        if left and seconds > self.long and self.shorter and affordable:
            affordable -= affordable % 10 ** max(0, len(str(affordable)) - 2)
            line += f"; {self.shorter(affordable)} takes {time_text(affordable * each)}"
        self.write(line)


def _is_notebook() -> bool:
    from transformers.utils.import_utils import is_in_notebook

    return is_in_notebook()
