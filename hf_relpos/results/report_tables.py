"""The tables of a report: rows of cells, the first one the head."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from .estimates import Estimate
from .groups import Group
from .questions import changes_between
from .result_file import SLIDING


Rows = list[list[str]]


def perplexity_rows(groups: Sequence[Group]) -> Rows:
    """Perplexity by length with its interval for new runs on new text, and the ratio of the longest to the training
    length."""
    lengths = sorted({length for group in groups for length in group.lengths()})
    readings = [*([SLIDING] if any(group.has_sliding_baseline for group in groups) else []), *lengths]
    rows = [["setting", "seeds", *("sliding" if each == SLIDING else str(each) for each in readings), "ratio"]]
    for group in groups:
        weights, cells = group.document_weights, []
        for each in readings:
            known = group.has_sliding_baseline if each == SLIDING else each in group.lengths()
            cells.append(exp_cell(np.stack(list(group.losses(each).values())), weights, 2) if known else "–")
        base, long = group.train_length, group.lengths()[-1]
        if base in group.lengths() and long > base:
            cells.append(exp_cell(np.stack(list(changes_between(base, long)(group).values())), weights, 3))
        else:
            cells.append("–")
        rows.append([group.label, str(len(group.by_seed)), *cells])
    return rows


def score_rows(groups: Sequence[Group]) -> Rows:
    """Scores of a task by length and kind of row, with their intervals over the seeds."""
    conditions = list(dict.fromkeys(condition for group in groups for condition in group.conditions()))
    conditions.sort(key=lambda condition: int(condition.partition(" ")[0]))
    rows = [["setting", "seeds", *conditions]]
    for group in groups:
        cells = [mean_cell(group.values(c, "score"), 3) if c in group.conditions() else "–" for c in conditions]
        rows.append([group.label, str(len(group.by_seed)), *cells])
    return rows


def context_rows(groups: Sequence[Group], baseline: str) -> Rows:
    """In-context score and slope, and the score minus that of the baseline on the same tokens; see `CONTEXT_NOTE`."""
    (base,) = [group for group in groups if group.label == baseline]
    theirs = base.in_context_scores()
    rows = [["setting", "in-context score", f"minus that of {baseline}", "slope per 1000"]]
    for group in groups:
        ours, cells = group.in_context_scores(), ["–", "–"]
        if ours is not None:
            cells[0] = f"{mean_cell(ours[1], 3)} @{ours[0]}"
        if ours is not None and theirs is not None and ours[0] == theirs[0] and group is not base:
            seeds = sorted({*ours[1]} & {*theirs[1]})
            cells[1] = mean_cell({seed: ours[1][seed] - theirs[1][seed] for seed in seeds}, 3, "+")
        rows.append([group.label, *cells, mean_cell(group.slopes(), 3, "+")])
    return rows if any(cell != "–" for row in rows[1:] for cell in row[1:]) else rows[:1]


def setup_rows(groups: Sequence[Group]) -> Rows:
    """What was trained, setting by setting."""
    rows = [["setting", "parameters", "steps", "tokens", "learning rate", "trained at", "seeds"]]
    for group in groups:
        training = group.first["training"]
        tokens = training.get("num_tokens") or training.get("num_steps", 0) * (training.get("tokens_per_step") or 0)
        rows.append(
            [
                group.label,
                _count(training.get("num_parameters")),
                _count(training.get("num_steps")),
                _count(tokens),
                f"{training.get('recipe', {}).get('learning_rate', '–')}",
                f"{group.train_length}",
                ", ".join(map(str, group.by_seed)),
            ]
        )
    return rows


def _count(number: int | None) -> str:
    if not number:
        return "–"
    for size, unit in ((1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:,}"


def exp_cell(values: np.ndarray, weights: Sequence[int], digits: int) -> str:
    """exp of a mean and of its interval: "72.10 (70.00, 74.00)"."""
    found = Estimate.of(values, weights)
    return interval_cell((math.exp(min(x, 700.0)) for x in (found.mean, found.low, found.high)), f"{{:.{digits}f}}")


def mean_cell(by_seed: dict[int, float], digits: int, sign: str = "") -> str:
    """The mean over seeds with its interval: "4.28 (4.21, 4.35)"."""
    if not by_seed:
        return "–"
    found = Estimate.of(np.array([[value] for value in by_seed.values()]))
    return interval_cell((found.mean, found.low, found.high), f"{{:{sign}.{digits}f}}")


def interval_cell(values: Iterable[float], form: str) -> str:
    """A mean and the ends of its interval, which is left out where it is NaN, as of one run."""
    mean, low, high = values
    return form.format(mean) + ("" if math.isnan(low) else f" ({form.format(low)}, {form.format(high)})")
