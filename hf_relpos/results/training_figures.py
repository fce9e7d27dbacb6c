"""Figures of what a training did: its loss, that after a finetuning, and what longer rows are worth."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .figure_lines import bands, draw_line, finish, left_out, over_seeds
from .figure_style import log2_axis
from .groups import Group


def training_curves(figure: Any, groups: Sequence[Group]) -> None:
    """The training loss by step, of the steps that all seeds of a setting logged."""
    axes = figure.subplots()
    for group in logged(groups):
        steps, logs = _shared_steps(group), [_log(result) for result in group.by_seed.values()]
        draw_line(axes, steps, over_seeds([[log[step] for step in steps] for log in logs]), group.label)
    finish(axes, groups, marks=False, xlabel="step", ylabel="training loss (nats per token)")


def _log(result: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in result["training"].get("log", []) if "loss" in entry}


def _shared_steps(group: Group) -> list[int]:
    """The steps whose loss all seeds of a group logged."""
    return sorted(set.intersection(*(set(_log(result)) for result in group.by_seed.values())))


def logged(groups: Sequence[Group]) -> list[Group]:
    """→ the groups that have a curve of their training loss."""
    return [group for group in groups if _shared_steps(group)]


def caption_of_training(groups: Sequence[Group]) -> str:
    drawn = logged(groups)
    return bands(drawn, "for new seeds") + left_out(groups, drawn, "no step was logged by all seeds")


def finetune_curves(figure: Any, groups: Sequence[Group]) -> None:
    """A line for each setting over its steps; a setting that was finetuned for one number of steps is a point."""
    axes = figure.subplots()
    curves: dict[str, dict[int, list[float]]] = {}
    untrained: dict[str, list[float]] = {}  # which have no new length of their own
    for group in finetuned(groups):
        training, setting = group.first["training"], _setting_alone(group, "num_steps", "train_length")
        losses = list(group.values(str(group.lengths()[-1]), "loss").values())
        if training["num_steps"] == 0:
            untrained[f"{setting} {training['base_train_length']} →"] = losses
        else:
            name = f"{setting} {training['base_train_length']} → {group.train_length}"
            curves.setdefault(name, {})[training["num_steps"]] = losses
    for start, losses in untrained.items():
        for name in [name for name in curves if name.startswith(start)] or [f"{start} untrained"]:
            curves.setdefault(name, {})[0] = losses
    for name, points in curves.items():
        steps = sorted(points)
        found = over_seeds(np.array([points[step] for step in steps]).T)
        draw_line(axes, steps, found, name, marker="o", markersize=4)
    length, places = groups[0].lengths()[-1], sorted({step for points in curves.values() for step in points})
    axes.set_xscale("symlog", linthresh=min(filter(None, places), default=1))  # 0 steps are the model as it was
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xticks([], minor=True)
    finish(axes, groups, marks=False, xlabel="finetuning steps", ylabel=f"loss at {length} (nats per token)")


def finetuned(groups: Sequence[Group]) -> list[Group]:
    """→ the groups that started from models of another training."""
    return [group for group in groups if group.first["training"].get("base_train_length")]


def context_by_training_length(figure: Any, groups: Sequence[Group]) -> None:
    """In-context score and slope, a line for each setting over the lengths that it was trained at."""
    lengths = sorted({group.train_length for group in groups})
    (token, _), *_ = filter(None, (group.in_context_scores() for group in groups))
    names = {
        f"in-context score at token {token} (nats)": _score_at(token),
        "slope (nats per 1000 tokens)": Group.slopes,
    }
    for axes, (name, values_of) in zip(figure.subplots(1, 2), names.items()):
        for setting, members in _by_setting(groups).items():
            found = {group.train_length: values_of(group) for group in members}
            seeds = sorted(set.intersection(*(set(values) for values in found.values())))
            if seeds:
                rows = [[values[seed] for values in found.values()] for seed in seeds]
                draw_line(axes, [*found], over_seeds(rows), setting, marker="o", markersize=4)
        log2_axis(axes, lengths)
        finish(axes, groups, marks=False, xlabel="training length (tokens)", ylabel=name)


def has_training_lengths(groups: Sequence[Group]) -> bool:
    """Whether a setting was trained at several lengths, and has a score and a slope."""
    if finetuned(groups) or not _by_setting(groups):
        return False
    return any(group.in_context_scores() for group in groups) and any(group.slopes() for group in groups)


def _score_at(token: int) -> Callable[[Group], dict[int, float]]:
    def scores(group: Group) -> dict[int, float]:
        found = group.in_context_scores()
        return found[1] if found and found[0] == token else {}

    return scores


def _by_setting(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Setting without its training length → its groups, the shortest first, where it was trained at several."""
    found: dict[str, list[Group]] = {}
    for group in sorted(groups, key=lambda group: group.train_length):
        found.setdefault(_setting_alone(group, "train_length"), []).append(group)
    return {name: members for name, members in found.items() if len(members) > 1}


def _setting_alone(group: Group, *left_out: str) -> str:
    """ "rotary rope_type=yarn, factor=8.0": the label without some of its fields."""
    return " ".join(word for name, word in group.words.items() if word and name not in left_out)
