"""What a comparison takes on the clock, over all calls that went on with it."""

import json
import time
from contextlib import suppress
from pathlib import Path

from ..environment import write_json


TAKEN = "taken.json"  # in the folder of a comparison
PER_WRITE = 5.0  # seconds between two times that it is written


class Clock:
    """Counts seconds.

    Args:
        root: folder of the comparison, where calls leave what they took; by default nothing is read or written.
        begun: when this call began, in seconds of the epoch; now by default.

    Attributes:
        before: seconds that the calls before took.
        is_known: whether all training of the plan is counted: these calls left how long they took, or there is none.
    """

    def __init__(self, root: Path | None = None, begun: float | None = None) -> None:
        self.path = root / TAKEN if root else None
        self.begun = self.started = time.time() if begun is None else begun
        self.before = self.trained_before = 0.0
        self.is_known, self.written = self.path is None, 0.0
        if self.path is None:
            return
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads(self.path.read_text(encoding="utf-8"))
            self.before, self.trained_before = float(content["seconds"]), float(content["training"])
            self.is_known = True

    def start(self, anew: bool = False) -> None:
        """The runs begin; `anew`: those before are not of the plan any more."""
        if anew:
            self.trained_before, self.is_known = 0.0, True
        self.started = time.time()

    def taken(self) -> float:
        """Seconds of all calls."""
        return self.before + self.taken_here()

    def taken_here(self) -> float:
        """Seconds of this call."""
        return time.time() - self.begun

    def training(self) -> float:
        """Seconds of all calls since their runs began."""
        return self.trained_before + self.training_here()

    def training_here(self) -> float:
        """Seconds of this call since its runs began."""
        return time.time() - self.started

    def save(self, every: float = PER_WRITE) -> None:
        """Leaves what was taken for the next call, unless that was done just now."""
        now = time.time()
        if self.path and now - self.written >= every:
            write_json(self.path, {"seconds": self.taken(), "training": self.training()})
            self.written = now
