"""How far a comparison is: one count over all its stages, the time left at the measured pace, and the budget."""

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from ..messages import exact_time_text, time_text
from .comparison_clock import Clock
from .comparison_plan import AFTER, FEWEST_SEEDS, Plan, fewer_steps
from .grid import Run
from .progress import ACTIVE, Found, status


STAGES = ("two learning rates", "a third learning rate", "seeds")
OVERRUN = 1.1  # times the budget, from which it is said that it is exceeded, and from which no further seed is begun
MUCH = 1.25  # from which the steps are planned anew, and seeds that were begun are left
FEWEST_TIMED, TIMED_SHARE, LEAST_TIMED = 20, 0.05, 10.0  # steps; seconds, of the budget and at least, that tell a pace
SLOWER = "the machine is slower than when it was measured"


class PlanChanged(Exception):
    """The plan does not fit the budget any more.

    Attributes:
        plan: the one to go on with.
        news: what is new in it, in a line.
    """

    def __init__(self, plan: Plan, news: str) -> None:
        super().__init__(news)
        self.plan, self.news = plan, news


class ComparisonProgress:
    """Counts the runs of all stages, and says when the plan must change.

    Args:
        plan: what is done, with what each scheme costs.
        budget: seconds on the clock, of all calls together.
        num_parallel: runs at once.
        clock: of the comparison; by default one that begins now.
        seeds: of each scheme, if they were asked for: then they are no matter of the budget.
        is_new: whether this call made the plan, and its steps may change.
    """

    def __init__(
        self,
        plan: Plan,
        budget: float,
        num_parallel: int,
        clock: Clock | None = None,
        seeds: int | None = None,
        is_new: bool = False,
    ) -> None:
        self.plan, self.budget, self.num_parallel = plan, budget, num_parallel
        self.clock = clock or Clock()
        self.seeds, self.is_new = seeds, is_new
        self.number = 0
        self.trained: set[str] = set()  # keys of runs, in the stages before this one
        self.ready: set[str] = set()  # those of this stage that were done before it was begun
        self.past = self.skipped = 0.0  # of the stages before this one: by this call, and by earlier ones
        self.finished = self.told = False
        self.looked = 0.0

    @property
    def fits(self) -> bool:
        """Whether the plan itself is within the budget: seeds and schemes that were added need not be."""
        return self.plan.beside + self.plan.work() / self.num_parallel <= OVERRUN * self.budget

    def begin(self, runs: Sequence[Run], root: Path) -> None:
        """The next stage."""
        self.number += 1
        self.ready = {run.key for run in runs if status(run, root)["state"] == "done"}
        self.skipped += sum(self._seconds(run) for run in runs if run.key in self.ready)
        self.finished = self.finished or (self.skipped > 0 and self.clock.is_known)

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
        with suppress(OSError):  # a full disk stops a run where it saves
            self.clock.save()
        return f"{text}; about {time_text(self.left(found))} left"

    def left(self, found: Found, seeds: int | None = None) -> float:
        """Seconds that the plan still takes, also with another number of seeds: as planned until the pace is known."""
        done, total = self._done(found), self.plan.work(seeds)
        rest = max(0.0, total - self.skipped - done) / self.num_parallel
        pace = self.pace(found)
        if pace is None:
            return max(rest, (total - self.skipped) / self.num_parallel - self.clock.training())
        return pace * rest

    def pace(self, found: Found) -> float | None:
        """How many times as long as planned the work takes: by the runs that are done, which holds all that a run takes
        besides its steps, else by the steps of those that train; `None` before enough of them were timed."""
        done = self._done(found)
        if self.finished and self.clock.is_known:
            return self.clock.training() * self.num_parallel / max(1e-9, done + self.skipped)
        if self.finished and done:
            return self.clock.training_here() * self.num_parallel / done
        timed = [(run, state) for run, state in found if state["state"] == "training"]
        need = max(LEAST_TIMED, TIMED_SHARE * self.budget)
        enough = [state.get("timed_steps", 0) >= FEWEST_TIMED and state["timed_seconds"] >= need for _, state in timed]
        if not self.plan.costs or not enough or not all(enough):
            return None
        planned = sum(state["timed_steps"] * self.plan.costs[_scheme(run)][0] for run, state in timed)
        return sum(state["timed_seconds"] for _, state in timed) / planned

    def check(self, runs: Sequence[Run], root: Path) -> None:
        """Looks at the runs of this stage, at most once a second.

        Raises:
            PlanChanged: if they will take too long.
        """
        now = time.time()
        if now - self.looked >= 1:
            self.looked = now
            found = [(run, status(run, root, self.clock.begun)) for run in runs]
            if changed := self.change(found):
                raise changed

    def change(self, found: Found) -> PlanChanged | None:
        """What must change for the budget, as far as that can be: fewer steps as long as hardly anything is trained,
        fewer seeds later."""
        pace = self.pace(found)
        if pace is None or not (self.fits and self.clock.is_known):
            return None
        if self.number == len(STAGES):
            return self._fewer_seeds(found)
        ended = sum(state["state"] in ("done", "failed") for _, state in found)
        if not self.is_new or self.number > 1 or ended > self.num_parallel:
            return None
        expected = self.clock.taken() + self.left(found, self.seeds or FEWEST_SEEDS)
        if expected <= MUCH * self.budget:
            return None
        plan = fewer_steps(
            self.plan, pace, self.budget, self.num_parallel, self.seeds, beside=self.clock.taken() + AFTER
        )
        if plan is None:
            return None
        news = f"{SLOWER}: {plan.steps} steps for each run instead of {self.plan.steps}, {plan.seeds} seeds, "
        news += f"{time_text(plan.seconds)} from here; what was trained with {self.plan.steps} steps is not used"
        return PlanChanged(plan, news)

    def _fewer_seeds(self, found: Found) -> PlanChanged | None:
        """In the last stage: those that the time left pays for, at least two, and all that are done."""
        numbers = [*dict.fromkeys(run.settings["seed"] for run, _ in found)]
        ended = [numbers.index(run.settings["seed"]) + 1 for run, state in found if state["state"] == "done"]
        begun = any(state["state"] != "waiting" for run, state in found if run.key not in self.trained)
        least, planned = max([FEWEST_SEEDS, *ended]), self.plan.seeds
        if self.seeds or least >= planned:
            return None
        taken = self.clock.taken()
        if taken + self.left(found) <= (MUCH if begun else OVERRUN) * self.budget:
            return None
        fitting = (n for n in range(planned - 1, least, -1) if taken + self.left(found, n) <= self.budget)
        plan = self.plan.with_seeds(next(fitting, least))
        return PlanChanged(plan, f"{plan.seeds} seeds instead of {planned}: the time that is left pays for no more")

    def remark(self, found: Found) -> str:
        """Once, that the budget will not do; else nothing."""
        expected = self.clock.taken() + self.left(found)
        if self.told or not self.finished or expected <= OVERRUN * self.budget:
            return ""
        self.told = True
        why = f": {SLOWER}" if self.fits else ""
        if why and not self.seeds and self.plan.seeds > FEWEST_SEEDS and self.number < len(STAGES):
            why += "; if that stays so, there will be fewer seeds"
        over = exact_time_text(expected - self.budget)
        return f"all will take about {exact_time_text(expected)}, {over} more than the budget{why}"

    def conclusion(self) -> str:
        """At the end: what it took, and by how much the budget was exceeded."""
        taken, here = self.clock.taken(), self.clock.taken_here()
        text = f"it took {exact_time_text(here)}"
        if self.clock.before:
            text += f", {exact_time_text(taken)} with the calls before"
        if taken <= OVERRUN * self.budget:
            return text
        why = f": {SLOWER.replace(' is ', ' was ')}" if self.fits else ""
        return f"{text}, {exact_time_text(taken - self.budget)} more than the budget{why}"

    def _done(self, found: Found) -> float:
        """Seconds of the plan that were done since this began to count."""
        total = self.past
        for run, state in found:
            if run.key in self.ready:
                continue
            if state["state"] in ("done", "failed"):
                self.finished = True
                total += self._seconds(run)
            elif state["state"] in ACTIVE and run.key not in self.trained:
                steps = (state.get("step", 0) - state.get("first_step", 0)) / max(1, state.get("steps", 1))
                total += steps * self.plan.training(_scheme(run)) + (self.plan.start_up if steps else 0.0)
        return total

    def _seconds(self, run: Run) -> float:
        """What a run was planned to take: its training, unless an earlier stage did it, and its evaluation in the last
        stage."""
        trains = 0.0 if run.key in self.trained else self.plan.start_up + self.plan.training(_scheme(run))
        return trains + (self.plan.evaluation(_scheme(run)) if self.number == len(STAGES) else 0.0)


def _scheme(run: Run) -> str:
    return run.settings["pos_embedding_type"]
