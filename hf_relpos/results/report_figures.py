"""Figures over seeds: the mean of each group of runs as a line, the range of its seeds as a band."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .plots import FEW_COLORS, NUM_COLORS, figure_png, new_figure, plain
from .result_file import smooth_by_position, text_title
from .statistics import Group


# with more groups than this, a figure is larger and its legend stands beside it
MAX_GROUPS_WITH_LEGEND_INSIDE = 10


def draw_figures(groups: Sequence[Group]) -> list[tuple[str, bytes]]:
    """→ heading and PNG of each figure that the groups have data for."""
    return [(heading, _png(draw, groups)) for heading, applies, draw in FIGURES if applies(groups)]


def draw_group(group: Group) -> tuple[str, bytes]:
    """→ file name and PNG of the one figure of a group: loss by position or, for a task, score by length."""
    name, draw = ("score_by_length", _score_by_length) if group.score_name else ("loss_by_position", _loss_by_position)
    return f"{name}.png", _png(draw, [group])


def _png(draw: Callable[[Any, Sequence[Group]], None], groups: Sequence[Group]) -> bytes:
    from cycler import cycler
    from matplotlib import rc_context, rcParamsDefault

    figure = new_figure(*_size(groups))
    # no two lines look the same
    styles = cycler(linestyle=["-", "--", ":", "-."]) * rcParamsDefault["axes.prop_cycle"]
    with rc_context({"axes.prop_cycle": styles}):
        draw(figure, groups)
        figure.suptitle(plain(_text_shown(draw, groups)), fontsize="medium")
    return figure_png(figure, NUM_COLORS if len(groups) > 1 else FEW_COLORS)


def _text_shown(draw: Callable[[Any, Sequence[Group]], None], groups: Sequence[Group]) -> str:
    """→ which text a figure is about: corpus and split."""
    if draw not in (_training_curves, _learned_biases):
        return text_title([group.first for group in groups])
    names = dict.fromkeys(group.first["training"].get("corpus", {}).get("name") for group in groups)
    return f"{', '.join(map(str, names))}, split train"


def _size(groups: Sequence[Group]) -> tuple[float, float]:
    """Width and height in inches."""
    if len(groups) > MAX_GROUPS_WITH_LEGEND_INSIDE:
        return 13, 8
    return (9, 5) if len(groups) > 1 else (5.8, 3.1)


def _band(axes: Any, xs: Sequence[float], rows: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of (seeds, points) values, with the range of the seeds as a band."""
    values = np.asarray(rows, dtype=np.float64)
    (line,) = axes.plot(xs, values.mean(axis=0), label=plain(label), **style)
    axes.fill_between(xs, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def _finish(axes: Any, groups: Sequence[Group], marks: bool = True, **labels: str) -> None:
    axes.set(**labels)
    for length in sorted({group.train_length for group in groups if marks and group.train_length}):
        axes.axvline(length, color="grey", linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    if len(groups) > MAX_GROUPS_WITH_LEGEND_INSIDE:
        for band in axes.collections:
            band.set_alpha(0.06)
        # in the order in which the lines end
        lines = sorted(axes.get_legend_handles_labels()[0], key=lambda line: -line.get_ydata()[-1])
        axes.legend(handles=lines, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes.legend(fontsize="small", ncols=2 if len(groups) > 8 else 1)


def _loss_by_position(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        curves = [smooth_by_position(result["loss_by_position"]) for result in group.by_seed.values()]
        _band(axes, curves[0][0], [losses for _, losses in curves], group.label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    labels = {"xlabel": "tokens of context", "ylabel": "loss (nats per token), band: range of the seeds"}
    _finish(axes, groups, **labels)


def _perplexity_by_length(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        lengths = group.lengths()
        rows = np.array([list(group.values(str(length), "perplexity").values()) for length in lengths]).T
        _band(axes, lengths, rows, group.label, marker="o", markersize=4)
    lengths = sorted({length for group in groups for length in group.lengths()})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xticks([], minor=True)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:.4g}")
    _finish(axes, groups, xlabel="evaluation length (tokens)", ylabel="perplexity, band: range of the seeds")


def _score_by_length(figure: Any, groups: Sequence[Group]) -> None:
    """A panel for each kind of row."""
    kinds = list(dict.fromkeys(condition.partition(" ")[2] for condition in groups[0].conditions()))
    columns = min(3, len(kinds))
    figure.set_size_inches(9, 0.8 + 4.2 * math.ceil(len(kinds) / columns) / (1 if columns == 1 else 1.4))
    panels = figure.subplots(math.ceil(len(kinds) / columns), columns, squeeze=False, sharex=True, sharey=True).flat
    for kind, axes in zip(kinds, panels):  # in this order: the panels that are left stay in the iterator
        for group in groups:
            names = {length: f"{length} {kind}".strip() for length in group.lengths()}
            rows = np.array([list(group.values(name, "score").values()) for name in names.values()]).T
            _band(axes, list(names), rows, group.label, marker="o", markersize=4)
        lengths = sorted({length for group in groups for length in group.lengths()})
        axes.set(xscale="log", title=plain(kind), ylim=(-0.03, 1.03))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        score = plain(groups[0].score_name)
        _finish(axes, groups, xlabel="length (tokens)", ylabel=f"{score}, band: range of the seeds")
        if axes is not figure.axes[0]:
            axes.legend().remove()
            axes.set_ylabel("")
    for axes in list(panels):
        axes.set_axis_off()


def _training_curves(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        logs = [_log(result) for result in group.by_seed.values()]
        steps = sorted(set.intersection(*(set(log) for log in logs)))
        _band(axes, steps, [[log[step] for step in steps] for log in logs], group.label)
    _finish(axes, groups, marks=False, xlabel="step", ylabel="training loss (nats per token)")


def _log(result: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in result["training"].get("log", []) if "loss" in entry}


def _finetune_curves(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    curves: dict[str, dict[int, list[float]]] = {}
    for group in _finetuned(groups):
        first = group.first
        name = f"{first['pos_embedding_type']} {first['training']['base_train_length']} → {first['train_length']}"
        losses = list(group.values(str(group.lengths()[-1]), "loss").values())
        curves.setdefault(name, {})[first["training"]["num_steps"]] = losses
    for name, points in curves.items():
        steps = sorted(points)
        _band(axes, steps, np.array([points[step] for step in steps]).T, name, marker="o", markersize=4)
    length = groups[0].lengths()[-1]
    axes.set_xscale("log")
    _finish(axes, groups, marks=False, xlabel="finetuning steps", ylabel=f"loss at {length} (nats per token)")


def _finetuned(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.first["training"].get("base_train_length")]


def _learned_biases(figure: Any, groups: Sequence[Group]) -> None:
    """One panel for each scheme with a bias, of its first seed: a line for each layer and head."""
    from matplotlib import colormaps

    shown = [group for group in groups if _curves(group)]
    columns = min(3, len(shown))
    figure.set_size_inches(9, 3.2 * math.ceil(len(shown) / columns))
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False, sharex=True).flat
    for group, axes in zip(shown, panels):  # in this order: the panels that are left stay in the iterator
        curves = _curves(group)
        for layer, heads in enumerate(curves["layers"]):
            color = colormaps["viridis"](layer / max(1, len(curves["layers"]) - 1))
            for head, values in enumerate(heads):
                xs = [distance + 1 for distance in curves["distances"]]
                axes.plot(xs, values, color=color, linewidth=0.9, label=f"layer {layer}" if head == 0 else None)
        title = plain(f"{group.label}, seed {next(iter(group.by_seed))}")
        axes.set(xscale="log", title=title, xlabel="distance + 1 (tokens)")
        if np.ptp(curves["layers"]) > 100:  # near distances would not show beside far ones
            axes.set_yscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_axis_off()
    figure.axes[0].set_ylabel("bias (added to the scores)")
    figure.axes[0].legend(fontsize="x-small")


def _curves(group: Group) -> dict[str, Any] | None:
    return group.first.get("distance_bias")


# heading, whether it applies, what draws it
FIGURES: tuple[tuple[str, Callable[[Sequence[Group]], Any], Callable[[Any, Sequence[Group]], None]], ...] = (
    ("Loss by position", lambda groups: not groups[0].score_name, _loss_by_position),
    (
        "Perplexity by length",
        lambda groups: not groups[0].score_name and len(groups[0].lengths()) > 1,
        _perplexity_by_length,
    ),
    ("Score by length", lambda groups: groups[0].score_name, _score_by_length),
    ("Loss after finetuning", _finetuned, _finetune_curves),
    ("Training loss", lambda groups: all(map(_log, groups[0].by_seed.values())), _training_curves),
    ("Bias by distance", lambda groups: any(map(_curves, groups)), _learned_biases),
)
