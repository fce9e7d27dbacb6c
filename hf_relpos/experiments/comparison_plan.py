"""What a comparison can afford: steps and seeds for a budget, from steps that were timed on this machine."""

import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
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
START_UP = 12.0  # seconds of a run besides its steps and its evaluation
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
    """

    steps: int
    seeds: int
    num_runs: int
    seconds: float


def measure(config: RelPosConfig, batch_size: int, length: int, device: str, bf16: bool) -> float:
    """Seconds of a training step with a model of this configuration: the fastest of three after one to warm up."""
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
    return min(times[1:])


def make_plan(
    costs: Sequence[Cost], budget: float, num_parallel: int, most_steps: int, seeds: int | None = None
) -> Plan:
    """The most steps and seeds that fit.

    Args:
        costs: of each scheme.
        budget: seconds on the clock.
        num_parallel: runs at once.
        most_steps: beyond which the text would be read too often.
        seeds: of each scheme; by default as many as the budget allows, 2 to 5.

    Raises:
        ValueError: if the budget affords no comparison, saying what it would take.
    """
    choices = [seeds] if seeds else range(MOST_SEEDS, FEWEST_SEEDS - 1, -1)
    for count in choices:
        fixed, per_step = _seconds(costs, count, 0, num_parallel), _seconds(costs, count, 1, num_parallel)
        steps = int((budget - fixed) / (per_step - fixed))
        enough = STEPS_FOR_A_SEED if count > 3 and not seeds else FEWEST_STEPS
        if steps >= min(enough, most_steps) and steps >= FEWEST_STEPS:
            steps = min(steps, most_steps, MOST_STEPS)
            return Plan(steps, count, _num_runs(costs, count), _seconds(costs, count, steps, num_parallel))
    fewest = choices[-1]
    needed = _seconds(costs, fewest, FEWEST_STEPS, num_parallel)
    raise ValueError(
        f"`budget` of {time_text(budget)} affords no comparison: {len(costs)} schemes with {fewest} seeds and "
        f"{FEWEST_STEPS} steps each take about {time_text(1.05 * needed)} here; allow that, or name fewer schemes."
    )


def read_plan(root: Path, asked: dict[str, Any]) -> Plan | None:
    """The plan that an earlier call made in a folder, which later ones keep: steps that were timed anew would be other
    runs.

    Args:
        root: folder of the comparison.
        asked: what the plan was made for.

    Raises:
        ValueError: if it was made for something else, naming the field.
    """
    path = root / PLAN
    if not path.is_file():
        return None
    content = read_json(path, "plan")
    with reading(f"plan {str(path)!r} cannot be read"):
        before, plan = dict(content["asked"]), Plan(**content["plan"])
    for name, value in asked.items():
        if before.get(name) != value:
            raise ValueError(
                f"`output_dir` {str(root)!r} holds another comparison: its `{name}` is {before.get(name)!r}, got "
                f"{value!r}; choose another."
            )
    return plan


def save_plan(root: Path, asked: dict[str, Any], plan: Plan) -> None:
    """Keeps a plan for the calls that go on with it."""
    write_json(root / PLAN, {"asked": asked, "plan": asdict(plan)})


def _num_runs(costs: Sequence[Cost], seeds: int) -> int:
    return len(costs) * (NUM_RATES + seeds - 1)


def _seconds(costs: Sequence[Cost], seeds: int, steps: int, num_parallel: int) -> float:
    """What all runs take on the clock."""
    training = sum(START_UP + steps * cost.step for cost in costs) * (NUM_RATES + seeds - 1)
    return (training + sum(cost.evaluation for cost in costs) * seeds) / num_parallel
