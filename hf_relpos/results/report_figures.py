"""Figures over seeds: the mean of each group of runs as a line with its name at the end, an interval as a band."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .estimates import CONFIDENCE, Estimate
from .figure_style import (
    FEW_COLORS,
    NUM_COLORS,
    figure_png,
    figure_size,
    figure_style,
    finish_axes,
    log2_axis,
    new_figure,
    plain,
)
from .groups import Group
from .questions import changes_between
from .result_file import smooth_by_position, text_title


SHOWN_LENGTHS = 4  # training lengths that the figure of biases shows, on a scale where a line is a line
LARGEST_BIAS = 12.0  # beyond which a softmax is all or nothing
MOST_CHANGE = 40.0  # per cent: the top of the figure of changes


def draw_figures(groups: Sequence[Group], baseline: str) -> list[tuple[str, bytes]]:
    """→ heading and PNG of each figure that the groups have data for; the first one shows the answer at a glance.

    Args:
        groups: from `group_results`.
        baseline: label of the group whose loss by position is subtracted.
    """
    found = []
    if not groups[0].score_name and len(groups) > 1:
        heading = f"Loss by position, minus that of {baseline}"
        found.append((heading, _png(lambda figure, all_: _loss_over_baseline(figure, all_, baseline), groups)))
    return found + [(heading, _png(draw, groups)) for heading, applies, draw in FIGURES if applies(groups)]


def draw_group(group: Group) -> tuple[str, bytes]:
    """→ file name and PNG of the one figure of a group: loss by position or, for a task, score by length."""
    name, draw = ("score_by_length", _score_by_length) if group.score_name else ("loss_by_position", _loss_by_position)
    return f"{name}.png", _png(draw, [group])


def _png(draw: Callable[[Any, Sequence[Group]], None], groups: Sequence[Group]) -> bytes:
    figure = new_figure(*figure_size(len(groups)))
    with figure_style():
        draw(figure, groups)
        figure.suptitle(plain(_text_shown(draw, groups)), fontsize="medium")
    return figure_png(figure, NUM_COLORS if len(groups) > 1 else FEW_COLORS)


def _text_shown(draw: Callable[[Any, Sequence[Group]], None], groups: Sequence[Group]) -> str:
    """→ which text a figure is about: corpus and split."""
    if draw not in (_training_curves, _learned_biases):
        return text_title([group.first for group in groups])
    names = dict.fromkeys(group.first["training"].get("corpus", {}).get("name") for group in groups)
    return f"{', '.join(map(str, names))}, split train"


def _band(axes: Any, xs: Sequence[float], rows: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of (seeds, points) values, with its 95 % interval over the seeds as a band."""
    from scipy import stats

    values = np.asarray(rows, dtype=np.float64)
    mean, count = values.mean(axis=0), len(values)
    (line,) = axes.plot(xs, mean, label=plain(label), **style)
    if count > 1:
        half = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * values.std(axis=0, ddof=1) / math.sqrt(count)
        axes.fill_between(xs, mean - half, mean + half, color=line.get_color(), alpha=0.15, linewidth=0)


def _finish(axes: Any, groups: Sequence[Group], marks: bool = True, **labels: str) -> None:
    finish_axes(axes, [group.train_length for group in groups if marks and group.train_length], **labels)


def _positions(groups: Sequence[Group]) -> list[int]:
    """Powers of two up to the last position."""
    last = max(smooth_by_position(group.first["loss_by_position"])[0][-1] for group in groups)
    return [2**octave for octave in range(math.ceil(math.log2(last)) + 1)]


def _loss_over_baseline(figure: Any, groups: Sequence[Group], baseline: str) -> None:
    """On the same tokens, so that what is hard or easy in the text cancels."""
    axes = figure.subplots()
    (base,) = [group for group in groups if group.label == baseline]
    for group in groups:
        seeds = sorted({*group.by_seed} & {*base.by_seed})
        curves = [_curves_of(group, seed) + _curves_of(base, seed) for seed in seeds]
        if curves:
            rows = [np.subtract(ours, theirs) for _, ours, _, theirs in curves]
            _band(axes, curves[0][0], rows, group.label, linewidth=1.8)
    log2_axis(axes, _positions(groups))
    # the first tokens say little, and a few settings that are far off would hide the others
    rows = np.concatenate([line.get_ydata()[2:] for line in axes.get_lines()])
    quarter, three = np.quantile(rows, (0.25, 0.75))
    spread = 4 * (three - quarter)
    low, high = min(max(rows.min(), quarter - spread), 0.0), max(min(rows.max(), three + spread), 0.0)
    axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    _finish(axes, groups, xlabel="tokens of context", ylabel=f"loss − loss of {plain(baseline)} (nats per token)")


def _curves_of(group: Group, seed: int) -> tuple[list[float], list[float]]:
    return smooth_by_position(group.by_seed[seed]["loss_by_position"])


def change_figure(groups: Sequence[Group]) -> bytes:
    """→ PNG: how the perplexity changes with the length, by setting, with intervals for new seeds and new text."""
    return _png(_change_by_length, groups)


def _change_by_length(figure: Any, groups: Sequence[Group]) -> None:
    """In per cent of the perplexity at the training length, on the same tokens at every length."""
    axes = figure.subplots()
    for group in groups:
        lengths = [length for length in group.lengths() if length >= group.train_length]
        found = [_change(group, length) for length in lengths]
        means, lows, highs = (
            [100 * math.expm1(min(value, 20.0)) for value in values]
            for values in zip(*((each.mean, each.low, each.high) for each in found))
        )
        (line,) = axes.plot(lengths, means, label=plain(group.label), marker="o", markersize=4)
        if len(group.by_seed) > 1:
            axes.fill_between(lengths, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)
    axes.axhline(0, color="grey", linewidth=1)
    rows = np.concatenate([line.get_ydata() for line in axes.get_lines()[:-1]])
    # the best of them are told apart near 0; what grows without limit leaves the figure
    axes.set_ylim(min(rows.min() * 1.3, -1.0), min(rows.max() * 1.05, MOST_CHANGE))
    log2_axis(axes, sorted({length for group in groups for length in group.lengths() if length >= group.train_length}))
    axes.yaxis.set_major_formatter("{x:+.0f} %")
    labels = {"xlabel": "evaluation length (tokens)", "ylabel": "change of perplexity from the training length"}
    _finish(axes, groups, marks=False, **labels)


def _change(group: Group, length: int) -> Estimate:
    """The log ratio of the perplexity at a length to that at the training length."""
    weights = group.document_weights if len(group.document_weights) > 1 else None
    return Estimate.of(np.stack([*changes_between(group.train_length, length)(group).values()]), weights)


def _has_longer_lengths(groups: Sequence[Group]) -> bool:
    if groups[0].score_name:
        return False
    return all(group.train_length in group.lengths() and group.train_length < group.lengths()[-1] for group in groups)


def _loss_by_position(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        curves = [smooth_by_position(result["loss_by_position"]) for result in group.by_seed.values()]
        _band(axes, curves[0][0], [losses for _, losses in curves], group.label)
    log2_axis(axes, _positions(groups))
    _finish(axes, groups, xlabel="tokens of context", ylabel="loss (nats per token)")


def _perplexity_by_length(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        lengths = group.lengths()
        rows = np.array([list(group.values(str(length), "perplexity").values()) for length in lengths]).T
        _band(axes, lengths, rows, group.label, marker="o", markersize=4)
    axes.set_yscale("log")
    log2_axis(axes, sorted({length for group in groups for length in group.lengths()}))
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:.4g}")
    _finish(axes, groups, xlabel="evaluation length (tokens)", ylabel="perplexity")


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
        axes.set(title=plain(kind), ylim=(-0.03, 1.03))
        log2_axis(axes, lengths)
        _finish(axes, groups, xlabel="length (tokens)", ylabel=plain(groups[0].score_name))
        if axes is not figure.axes[0]:
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
    """One panel for each scheme with a bias, of its first seed: a line for each layer and head, up to ±12."""
    from matplotlib import colormaps

    shown = [group for group in groups if _curves(group)]
    columns = min(3, len(shown))
    figure.set_size_inches(9, 3.2 * math.ceil(len(shown) / columns))
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False, sharex=True).flat
    for group, axes in zip(shown, panels):  # in this order: the panels that are left stay in the iterator
        curves = _curves(group)
        far = SHOWN_LENGTHS * group.train_length
        near = [index for index, distance in enumerate(curves["distances"]) if distance <= far]
        distances = [curves["distances"][index] for index in near]
        for layer, heads in enumerate(curves["layers"]):
            color = colormaps["viridis"](layer / max(1, len(curves["layers"]) - 1))
            for head, values in enumerate(heads):
                label = f"layer {layer}" if head == 0 else None
                axes.plot(
                    distances, [values[index] for index in near], color=color, linewidth=0.9, linestyle="-", label=label
                )
        title = plain(f"{group.label}, seed {next(iter(group.by_seed))}")
        axes.set(title=title, xlabel="distance (tokens)")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -LARGEST_BIAS), min(high, LARGEST_BIAS))
        axes.axvline(group.train_length, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_axis_off()
    figure.axes[0].set_ylabel("bias (added to the scores)")
    figure.axes[0].legend(fontsize="x-small")


def _curves(group: Group) -> dict[str, Any] | None:
    return group.first.get("distance_bias")


# heading, whether it applies, what draws it
FIGURES: tuple[tuple[str, Callable[[Sequence[Group]], Any], Callable[[Any, Sequence[Group]], None]], ...] = (
    ("Change of perplexity with the length", _has_longer_lengths, _change_by_length),
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
