"""How far a comparison is: one count over all its stages, the time left at the measured pace, and the budget."""

import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..messages import time_text
from .comparison_plan import Plan
from .grid import Run
from .progress import ACTIVE, Found, status


STAGES = ("two learning rates", "a third learning rate", "seeds")
OVERRUN = 1.1  # times the budget, from which it is said that it is exceeded


class ComparisonProgress:
    """Counts the runs of all stages.

    Args:
        plan: what is done, with what each scheme costs.
        budget: seconds on the clock.
        num_parallel: runs at once.
    """

    def __init__(self, plan: Plan, budget: float, num_parallel: int) -> None:
        self.plan, self.budget, self.num_parallel = plan, budget, num_parallel
        self.begun, self.number = time.time(), 0
        self.trained: set[str] = set()  # keys of runs, in the stages before this one
        self.ready: set[str] = set()  # those of this stage that an earlier call did
        self.total = plan.work()  # seconds of one worker
        self.past = self.skipped = 0.0  # of the stages before this one: by this call, and by earlier ones
        self.finished = self.told = False

    def begin(self, runs: Sequence[Run], root: Path) -> None:
        """The next stage."""
        self.number += 1
        self.ready = {run.key for run in runs if status(run, root)["state"] == "done"}
        self.skipped += sum(self._seconds(run) for run in runs if run.key in self.ready)

    def end(self, runs: Sequence[Run]) -> None:
        """The stage is done."""
        self.past += sum(self._seconds(run) for run in runs if run.key not in self.ready)
        self.trained |= {run.key for run in runs}

    def summary(self, found: Found) -> str:
        """ "7 of 15 runs, stage 3 of 3, seeds: 2 training, 6 waiting; about 5 min left" """
        ended = self.trained | {run.key for run, state in found if state["state"] in ("done", "failed")}
        counts = Counter(state["state"] for _, state in found if state["state"] in (*ACTIVE, "waiting", "failed"))
        states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        stage = f"stage {self.number} of {len(STAGES)}, {STAGES[self.number - 1]}"
        text = f"{len(ended)} of {self.plan.num_runs} runs, {stage}" + (f": {states}" if states else "")
        return f"{text}; about {time_text(self.left(found))} left"

    def left(self, found: Found) -> float:
        """Seconds: as planned until a run of this call is done, then at the pace of what was done, which holds all that
        a run takes besides its steps."""
        elapsed = time.time() - self.begun
        done = self._done(found)
        rest = max(0.0, self.total - self.skipped - done) / self.num_parallel
        if not self.finished or not done:
            return max(rest, (self.total - self.skipped) / self.num_parallel - elapsed)
        return elapsed * self.num_parallel / done * rest

    def remark(self, found: Found) -> str:
        """Once, that the budget will not do; else nothing."""
        expected = time.time() - self.begun + self.left(found)
        if self.told or not self.finished or self.skipped or expected <= OVERRUN * self.budget:
            return ""
        self.told = True
        return (
            f"all will take about {time_text(expected)}, {time_text(expected - self.budget)} more than the budget: the "
            "machine is slower than when it was measured"
        )

    def conclusion(self) -> str:
        """At the end, by how much the budget was exceeded; else nothing."""
        taken = time.time() - self.begun
        if self.skipped or taken <= OVERRUN * self.budget:
            return ""
        return (
            f"it took {time_text(taken)}, {time_text(taken - self.budget)} more than the budget: the machine was "
            "slower than when it was measured"
        )

    def _done(self, found: Found) -> float:
        """Seconds of the plan that this call has done."""
        total = self.past
        for run, state in found:
            if run.key in self.ready:
                continue
            if state["state"] in ("done", "failed"):
                self.finished = True
                total += self._seconds(run)
            elif state["state"] in ACTIVE and run.key not in self.trained:
                steps = (state.get("step", 0) - state.get("first_step", 0)) / max(1, state.get("steps", 1))
                total += steps * self.plan.training(_scheme(run))
        return total

    def _seconds(self, run: Run) -> float:
        """What a run was planned to take: its training, unless an earlier stage did it, and its evaluation in the last
        stage."""
        trains = 0.0 if run.key in self.trained else self.plan.start_up + self.plan.training(_scheme(run))
        return trains + (self.plan.evaluation(_scheme(run)) if self.number == len(STAGES) else 0.0)


def _scheme(run: Run) -> str:
    return run.settings["pos_embedding_type"]
