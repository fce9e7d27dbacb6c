"""What a comparison can afford: steps and seeds for a budget, from steps that were timed on this machine."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from ..environment import write_json
from ..file_reading import read_json, reading
from ..messages import time_text
from ..model.configuration_relpos import RelPosConfig
from ..training.model_setup import new_model


PLAN = "plan.json"
FEWEST_STEPS, MOST_STEPS = 100, 20_000
FEWEST_SEEDS, MOST_SEEDS = 2, 5
STEPS_FOR_A_SEED = 1500  # a further seed is worth more than steps beyond these
NUM_RATES = 3  # learning rates that are tried for each scheme, two at first and one on the better side
MAX_PASSES = 8  # over the training text
# seconds of a run besides its steps and its evaluation, by who does it
START_UP = {"here": 3.0, "forked": 9.0, "spawned": 12.0}
UNITS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}


def parse_budget(text: str) -> float:
    """ "20min", "90s", "2h" → seconds.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", str(text).lower())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise ValueError(f"`budget` must be a time such as 20min, 90s or 2h, got {text!r}.")
    return float(found[1]) * UNITS[found[2]]


@dataclass(frozen=True)
class Cost:
    """Seconds that a scheme takes here.

    Attributes:
        step: of one training step.
        evaluation: of the evaluation of one run.
    """

    step: float
    evaluation: float


@dataclass(frozen=True)
class Plan:
    """What is done.

    Attributes:
        steps: of each run.
        seeds: of each scheme.
        num_runs: all of them; the runs that choose the learning rate are of the first seed.
        seconds: what all that takes here.
        costs: scheme → seconds of a training step and of the evaluation of one run; empty where they are not known.
        start_up: seconds of a run besides these.
    """

    steps: int
    seeds: int
    num_runs: int
    seconds: float
    costs: dict[str, Sequence[float]] = field(default_factory=dict)
    start_up: float = 0.0

    def training(self, scheme: str) -> float:
        """Seconds of the steps of one run; where costs are not known, all runs take as long."""
        return self.steps * self.costs[scheme][0] if self.costs else self.seconds / self.num_runs

    def evaluation(self, scheme: str) -> float:
        """Seconds of the evaluation of one run."""
        return self.costs[scheme][1] if self.costs else 0.0

    def work(self, seeds: int | None = None) -> float:
        """Seconds that all runs take together, one after another, also with another number of seeds."""
        seeds = seeds or self.seeds
        if not self.costs:
            return self.seconds * (NUM_RATES + seeds - 1) / (NUM_RATES + self.seeds - 1)
        return _work([Cost(*each) for each in self.costs.values()], seeds, self.steps, self.start_up)


def measure(config: RelPosConfig, batch_size: int, length: int, device: str, bf16: bool) -> float:
    """Seconds of a training step with a model of this configuration: the middle one of three after one to warm up."""
    model = new_model(config, 0).to(device).train()
    model.skip_logits = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (batch_size, length), device=device)
    times = []
    for _ in range(4):
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    return sorted(times[1:])[1]


def make_plan(
    costs: dict[str, Cost],
    budget: float,
    num_parallel: int,
    most_steps: int,
    seeds: int | None = None,
    start_up: float = START_UP["spawned"],
) -> Plan:
    """The most steps and seeds that fit.

    Args:
        costs: scheme → what it costs.
        budget: seconds on the clock.
        num_parallel: runs at once.
        most_steps: beyond which the text would be read too often.
        seeds: of each scheme; by default as many as the budget allows, 2 to 5.
        start_up: seconds of a run besides its steps and its evaluation.

    Raises:
        ValueError: if the budget affords no comparison, saying what it would take.
    """
    choices = [seeds] if seeds else range(MOST_SEEDS, FEWEST_SEEDS - 1, -1)

    def seconds(count: int, steps: int) -> float:
        return _work([*costs.values()], count, steps, start_up) / num_parallel

    for count in choices:
        fixed = seconds(count, 0)
        steps = int((budget - fixed) / (seconds(count, 1) - fixed))
        enough = STEPS_FOR_A_SEED if count > 3 and not seeds else FEWEST_STEPS
        if steps >= min(enough, most_steps) and steps >= FEWEST_STEPS:
            steps = min(steps, most_steps, MOST_STEPS)
            kept = {name: (cost.step, cost.evaluation) for name, cost in costs.items()}
            return Plan(steps, count, _num_runs(len(costs), count), seconds(count, steps), kept, start_up)
    fewest = choices[-1]
    needed = seconds(fewest, FEWEST_STEPS)
    raise ValueError(
        f"`budget` of {time_text(budget)} affords no comparison: {len(costs)} schemes with {fewest} seeds and "
        f"{FEWEST_STEPS} steps each take about {time_text(1.05 * needed)} here; allow that, or name fewer schemes."
    )


def read_plan(root: Path, asked: dict[str, Any], num_parallel: int) -> tuple[Plan | None, str]:
    """The plan that an earlier call made in a folder, which later ones keep: steps that were timed anew would be other
    runs. A larger budget, or more seeds, adds seeds to it.

    Args:
        root: folder of the comparison.
        asked: what the plan was made for.
        num_parallel: runs at once.

    Returns:
        the plan, if there is one, and what is new in it.

    Raises:
        ValueError: if it was made for something else, naming the field.
    """
    path = root / PLAN
    if not path.is_file():
        return None, ""
    content = read_json(path, "plan")
    with reading(f"plan {str(path)!r} cannot be read"):
        before, plan = dict(content["asked"]), Plan(**content["plan"])
    budgets = [parse_budget(each["budget"]) for each in (before, asked)]
    for name, value in asked.items():
        grows = name == "budget" and budgets[1] > budgets[0] or name == "seeds" and (value or 5) >= plan.seeds
        if before.get(name) != value and not grows:
            raise ValueError(
                f"`output_dir` {str(root)!r} holds another comparison: its `{name}` is {before.get(name)!r}, got "
                f"{value!r}; choose another."
            )
    return _extended(plan, asked["seeds"], budgets, num_parallel)


def _extended(plan: Plan, seeds: int | None, budgets: Sequence[float], num_parallel: int) -> tuple[Plan, str]:
    """→ a plan with the further seeds that are asked for or that a larger budget affords, and a line about them."""
    times = {count: plan.work(count) / num_parallel for count in range(plan.seeds, MOST_SEEDS + 1)}
    affordable = [count for count, each in times.items() if count == plan.seeds or each <= budgets[1]]
    seeds = seeds or (affordable[-1] if budgets[1] > budgets[0] else plan.seeds)
    if seeds == plan.seeds:
        if budgets[1] == budgets[0] or seeds == MOST_SEEDS:
            return plan, ""
        more = time_text(times[seeds + 1] - times[seeds])
        return plan, f"the budget affords no further seed, which takes about {more} here: the plan is as it was"
    num_schemes = plan.num_runs // (NUM_RATES + plan.seeds - 1)
    made = replace(plan, seeds=seeds, num_runs=_num_runs(num_schemes, seeds), seconds=times[seeds])
    return made, (
        f"{seeds} seeds instead of {plan.seeds}: what is done is kept, and each run has {plan.steps} steps as before"
    )


def save_plan(root: Path, asked: dict[str, Any], plan: Plan) -> None:
    """Keeps a plan for the calls that go on with it."""
    write_json(root / PLAN, {"asked": asked, "plan": asdict(plan)})


def _num_runs(num_schemes: int, seeds: int) -> int:
    return num_schemes * (NUM_RATES + seeds - 1)


def _work(costs: Sequence[Cost], seeds: int, steps: int, start_up: float) -> float:
    """Seconds that all runs take one after another."""
    training = sum(start_up + steps * cost.step for cost in costs) * (NUM_RATES + seeds - 1)
    return training + sum(cost.evaluation for cost in costs) * seeds
