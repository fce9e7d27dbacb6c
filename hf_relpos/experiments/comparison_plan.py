"""What a comparison can afford: steps and seeds for a budget, from steps that were timed on this machine."""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..environment import write_json
from ..file_reading import read_json, reading
from ..messages import time_text


PLAN = "plan.json"
FEWEST_STEPS, MOST_STEPS = 100, 20_000
FEWEST_SEEDS, MOST_SEEDS = 2, 5
STEPS_FOR_A_SEED = 1500  # a further seed is worth more than steps beyond these
NUM_RATES = 3  # learning rates that are tried for each scheme, two at first and one on the better side
MAX_PASSES = 8  # over the training text
FEWEST_WINDOWS, MOST_WINDOWS = 8, 48  # of the run length, that are read
READING_SHARE = 0.2  # of the budget, that reading takes where the fewest windows do not take more
# seconds of a run besides its steps and its evaluation, by who does it
START_UP = {"here": 3.0, "forked": 9.0, "spawned": 12.0}
BEFORE, AFTER = 15.0, 15.0  # seconds that a comparison takes before its first run, at least, and after its last one
MARGIN = 1.1  # times what is needed at least, has a budget that is named to somebody
FEWER_STEPS = 0.8  # of the steps: what is trained anew has at most as many
UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}


def parse_budget(text: str) -> float:
    """ "20min", "90s", "2h" → seconds.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(text).lower())
    if not found or found[2] not in UNITS or not float(found[1]):
        number = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*", str(text))
        hint = f" (did you mean '{number[1]}min'?)" if number and float(number[1]) else ""
        raise ValueError(f"`budget` must be a time such as 20min, 90s or 2h, got {text!r}{hint}.")
    return float(found[1]) * UNITS[found[2]]


def budget_text(needed: float) -> str:
    """A budget, as the flag takes it, that pays for so many seconds with a margin."""
    seconds = MARGIN * needed
    return f"{math.ceil(seconds / 10) * 10}s" if seconds <= 90 else f"{math.ceil(seconds / 60)}min"


@dataclass(frozen=True)
class Cost:
    """Seconds that a scheme takes here.

    Attributes:
        step: of one training step.
        window: of the evaluation of one run, for each window of the run length.
    """

    step: float
    window: float


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        steps: of each run.
        seeds: of each scheme.
        num_runs: all of them; the runs that choose the learning rate are of the first seed.
        seconds: what all that takes here.
        costs: scheme → seconds of a training step and of the evaluation of one run, for each of its windows; empty
            where they are not known.
        start_up: seconds of a run besides these.
        beside: seconds of the whole besides its runs: what comes before and after them, and runs that are not used.
        windows: of the run length, that are read of the test text, the same by all runs.
    """

    steps: int
    seeds: int
    num_runs: int
    seconds: float
    costs: dict[str, Sequence[float]] = field(default_factory=dict)
    start_up: float = 0.0
    beside: float = 0.0
    windows: int = MOST_WINDOWS

    @property
    def num_schemes(self) -> int:
        """How many schemes are compared."""
        return self.num_runs // (NUM_RATES + self.seeds - 1)

    def excess(self, budget: float, given: str) -> str:
        """A line about a plan that is past its budget, as it may be with added schemes; empty where it fits.

        Args:
            budget: in seconds.
            given: the budget as it was given.
        """
        more = self.beside + self.seconds - budget
        if more < 60:  # what was timed anew differs by as much
            return ""
        return f"that is about {time_text(more)} more than `budget` {given}, to which only a new comparison is fitted"

    def training(self, scheme: str) -> float:
        """Seconds of the steps of one run; where costs are not known, all runs take as long."""
        return self.steps * self.costs[scheme][0] if self.costs else self.seconds / self.num_runs

    def evaluation(self, scheme: str) -> float:
        """Seconds of the evaluation of one run."""
        return self.windows * self.costs[scheme][1] if self.costs else 0.0

    def work(self, seeds: int | None = None) -> float:
        """Seconds that all runs take together, one after another, also with another number of seeds."""
        seeds = seeds or self.seeds
        if not self.costs:
            return self.seconds * (NUM_RATES + seeds - 1) / (NUM_RATES + self.seeds - 1)
        return _work([*_costs(self).values()], seeds, self.steps, self.start_up, self.windows)

    def with_seeds(self, seeds: int) -> "Plan":
        """→ the plan with another number of seeds."""
        seconds = self.seconds * self.work(seeds) / self.work()
        return replace(self, seeds=seeds, num_runs=_num_runs(self.num_schemes, seeds), seconds=seconds)

    def with_schemes(self, schemes: Sequence[str], costs: Mapping[str, Cost]) -> "Plan":
        """→ the plan for other schemes.

        Args:
            schemes: all of them.
            costs: of those that the plan does not have.
        """
        known = self.costs | _kept(costs)
        num_runs = _num_runs(len(schemes), self.seeds)
        if not {*schemes} <= {*known}:  # a plan without costs
            return replace(self, num_runs=num_runs, seconds=self.seconds * num_runs / self.num_runs)
        made = replace(self, num_runs=num_runs, costs={name: known[name] for name in schemes})
        return replace(made, seconds=self.seconds * made.work() / self.work())


def make_plan(
    costs: dict[str, Cost],
    budget: float,
    num_parallel: int,
    most_steps: int,
    seeds: int | None = None,
    start_up: float = START_UP["spawned"],
    beside: float = 0.0,
    ways: Sequence[tuple[str, Mapping[str, Cost], int]] = (),
    most_windows: int = MOST_WINDOWS,
) -> Plan:
    """The most steps and seeds that fit.

    Args:
        costs: scheme → what it costs.
        budget: seconds on the clock.
        num_parallel: runs at once.
        most_steps: beyond which the text would be read too often.
        seeds: of each scheme; by default as many as the budget allows, 2 to 5.
        start_up: seconds of a run besides its steps and its evaluation.
        beside: seconds of the whole besides its runs.
        ways: flags that make it cheaper, with the costs and the seeds that it has then, those that change little
            first; those that would do are named where the budget does not.
        most_windows: that the test text holds, or that are worth their time.

    Raises:
        ValueError: if the budget affords no comparison, saying what it would take.
    """
    plan = _largest_plan(costs, budget, num_parallel, most_steps, seeds, start_up, beside, most_windows)
    if plan is not None:
        return plan
    fewest = seeds or FEWEST_SEEDS
    needed = _least(costs, num_parallel, fewest, start_up) + beside
    found: dict[frozenset[str], str] = {}  # names of flags → the first of them that does, if no fewer flags do
    for flags, cheaper, count in ways:
        names = frozenset(word for word in flags.split() if word.startswith("--"))
        does = MARGIN * (_least(cheaper, num_parallel, count, start_up) + beside) <= budget
        if does and not any(fewer <= names for fewer in found):
            found[names] = flags
    others = [*found.values(), *(["fewer schemes"] if len(costs) > 2 else [])]
    more = f", or take {', or '.join(others)}" if others else ""
    raise ValueError(
        f"`budget` of {time_text(budget)} affords no comparison: {len(costs)} schemes with {fewest} seeds and "
        f"{FEWEST_STEPS} steps each take about {time_text(needed)} here; allow --budget {budget_text(needed)}{more}."
    )


def _least(costs: Mapping[str, Cost], num_parallel: int, seeds: int, start_up: float) -> float:
    """Seconds that the runs of the fewest steps and windows take."""
    return _work([*costs.values()], seeds, FEWEST_STEPS, start_up, FEWEST_WINDOWS) / num_parallel


def _largest_plan(
    costs: Mapping[str, Cost],
    budget: float,
    num_parallel: int,
    most_steps: int,
    seeds: int | None,
    start_up: float,
    beside: float,
    most_windows: int,
) -> Plan | None:
    """Arguments as `make_plan`; → `None` if nothing fits.

    Reading has its share of the budget, and what the steps leave of it: a run of few steps decides little, however many
    windows are read.
    """
    time = budget - beside

    def seconds(count: int, steps: int, windows: int) -> float:
        return _work([*costs.values()], count, steps, start_up, windows) / num_parallel

    def windows_in(count: int, left: float) -> int:
        window = seconds(count, 0, 1) - seconds(count, 0, 0)
        return max(FEWEST_WINDOWS, min(most_windows, int(left / window)))

    for count in [seeds] if seeds else range(MOST_SEEDS, FEWEST_SEEDS - 1, -1):
        reading = min(READING_SHARE * time, time - seconds(count, FEWEST_STEPS, 0))
        fixed = seconds(count, 0, windows_in(count, reading))
        steps = int((time - fixed) / (seconds(count, 1, 0) - seconds(count, 0, 0)))
        enough = STEPS_FOR_A_SEED if count > 3 and not seeds else FEWEST_STEPS
        if steps >= min(enough, most_steps) and steps >= FEWEST_STEPS:
            steps = min(steps, most_steps, MOST_STEPS)
            windows = windows_in(count, time - seconds(count, steps, 0))
            num_runs, total = _num_runs(len(costs), count), seconds(count, steps, windows)
            return Plan(steps, count, num_runs, total, _kept(costs), start_up, beside, windows)
    return None


def fewer_steps(
    plan: Plan, pace: float, budget: float, num_parallel: int, seeds: int | None, beside: float
) -> Plan | None:
    """The plan for a machine that turns out to be slower than when it was measured.

    Args:
        plan: as it was.
        pace: how many times as long as planned the work takes.
        budget, num_parallel, seeds: as for `make_plan`.
        beside: seconds besides the runs of the new plan, all that was spent before it among them.

    Returns:
        a plan with clearly fewer steps and no more windows, the fewest of both where nothing fits the budget; `None` if
        there is none.
    """
    costs = {name: Cost(pace * step, pace * window) for name, (step, window) in plan.costs.items()}
    start_up = max(1.0, pace) * plan.start_up
    most_steps = int(FEWER_STEPS * plan.steps)
    if not costs or most_steps < FEWEST_STEPS:
        return None
    found = _largest_plan(costs, budget, num_parallel, most_steps, seeds, start_up, beside, plan.windows)
    fewest = seeds or FEWEST_SEEDS
    return found or Plan(
        FEWEST_STEPS,
        fewest,
        _num_runs(len(costs), fewest),
        _least(costs, num_parallel, fewest, start_up),
        _kept(costs),
        start_up,
        beside,
        FEWEST_WINDOWS,
    )


def read_plan(root: Path, asked: dict[str, Any], num_parallel: int) -> tuple[Plan | None, str]:
    """The plan that an earlier call made in a folder, which later ones keep: steps that were timed anew would be other
    runs. A larger budget, or more seeds, adds seeds to it; other schemes are trained by it too, see
    `Plan.with_schemes`.

    Args:
        root: folder of the comparison.
        asked: what the plan was made for.
        num_parallel: runs at once.

    Returns:
        the plan, if there is one, for the schemes of all calls before, and what is new in it.

    Raises:
        ValueError: if it was made for something else, naming the field.
    """
    stored = _stored(root)
    if stored is None:
        return None, ""
    before, plan = stored
    budgets = [parse_budget(each["budget"]) for each in (before, asked)]
    for name, value in asked.items():
        grows = name == "schemes" or name == "budget" and budgets[1] > budgets[0]
        grows = grows or name == "seeds" and (value or MOST_SEEDS) >= plan.seeds
        if before.get(name) != value and not grows:
            raise ValueError(
                f"`output_dir` {str(root)!r} holds another comparison: its `{name}` is {before.get(name)!r}, got "
                f"{value!r}; choose another, or give what it was made with: schemes, seeds and budget may grow."
            )
    added = [name for name in asked["schemes"] if name not in before["schemes"]]
    made, news = _extended(plan, asked["seeds"], budgets[:1] * 2 if added else budgets, num_parallel)
    lines = [news] if news else []
    if added:
        lines.append(f"added: {', '.join(added)}, with {made.steps} steps and {made.seeds} seeds as the others")
    if absent := [name for name in before["schemes"] if name not in asked["schemes"]]:
        lines.append(f"not in this answer: {', '.join(absent)}, which stay in the folder; name them too to compare all")
    return made, "\n".join(lines)


def _stored(root: Path) -> tuple[dict[str, Any], Plan] | None:
    """What a plan was asked for, and the plan."""
    path = root / PLAN
    if not path.is_file():
        return None
    content = read_json(path, "plan")
    with reading(f"plan {str(path)!r} cannot be read"):
        return dict(content["asked"]), Plan(**content["plan"])


def _extended(plan: Plan, seeds: int | None, budgets: Sequence[float], num_parallel: int) -> tuple[Plan, str]:
    """→ a plan with the further seeds that are asked for or that a larger budget affords, and a line about them."""
    times = {count: plan.work(count) / num_parallel for count in range(plan.seeds, MOST_SEEDS + 1)}
    affordable = [count for count, each in times.items() if count == plan.seeds or plan.beside + each <= budgets[1]]
    seeds = seeds or (affordable[-1] if budgets[1] > budgets[0] else plan.seeds)
    if seeds == plan.seeds:
        if budgets[1] == budgets[0] or seeds == MOST_SEEDS:
            return plan, ""
        more = time_text(times[seeds + 1] - times[seeds])
        return plan, f"the budget affords no further seed, which takes about {more} here: the plan is as it was"
    return plan.with_seeds(seeds), (
        f"{seeds} seeds instead of {plan.seeds}: what is done is kept, and each run has {plan.steps} steps as before"
    )


def as_first_spelt(root: Path) -> Path:
    """The folder of a comparison as its first call spelt it, since its runs are named by the paths of their text; as it
    is where that leads elsewhere."""
    with suppress(ValueError, OSError, AttributeError, TypeError):
        first = Path(read_json(root / PLAN, "plan").get("output_dir", root))
        return first if first.resolve() == root.resolve() else root
    return root


def save_plan(root: Path, asked: dict[str, Any], plan: Plan) -> None:
    """Keeps a plan for the calls that go on with it; the schemes of earlier calls stay in it."""
    first = as_first_spelt(root)
    if stored := _stored(root):
        schemes = [*dict.fromkeys([*stored[0]["schemes"], *asked["schemes"]])]
        others = {name: Cost(*stored[1].costs[name]) for name in schemes if name in stored[1].costs}
        plan, asked = plan.with_schemes(schemes, others | _costs(plan)), asked | {"schemes": schemes}
    write_json(root / PLAN, {"asked": asked, "plan": asdict(plan), "output_dir": str(first)})


def _costs(plan: Plan) -> dict[str, Cost]:
    return {name: Cost(*each) for name, each in plan.costs.items()}


def _kept(costs: Mapping[str, Cost]) -> dict[str, Sequence[float]]:
    """Costs as a plan keeps them."""
    return {name: (cost.step, cost.window) for name, cost in costs.items()}


def _num_runs(num_schemes: int, seeds: int) -> int:
    return num_schemes * (NUM_RATES + seeds - 1)


def _work(costs: Sequence[Cost], seeds: int, steps: int, start_up: float, windows: int) -> float:
    """Seconds that all runs take one after another."""
    training = sum(start_up + steps * cost.step for cost in costs) * (NUM_RATES + seeds - 1)
    return training + windows * sum(cost.window for cost in costs) * seeds
