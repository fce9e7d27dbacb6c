"""Figures over seeds: the mean of each group of runs as a line with its name at the end, an interval as a band. The
caption of each says what its bands are."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .bias_figure import bias_curves, caption_of_biases, draw_biases
from .figure_lines import bands, draw_line, finish, left_out, on_this_text, over_documents, over_seeds
from .figure_style import (
    FEW_COLORS,
    NUM_COLORS,
    exact_labels,
    figure_png,
    figure_size,
    figure_style,
    log2_axis,
    new_figure,
    plain,
    round_ticks,
    write_caption,
)
from .groups import Group
from .questions import changes_between
from .result_file import has_held_out_ends, smooth_by_position, text_title
from .training_figures import (
    caption_of_training,
    context_by_training_length,
    finetune_curves,
    finetuned,
    has_training_lengths,
    logged,
    training_curves,
)


MOST_CHANGE = 40.0  # per cent: the top of the figure of changes


class Figure(NamedTuple):
    """A figure that was drawn.

    Attributes:
        heading: its title.
        image: PNG.
        caption: what it shows and what its bands are; it stands in the image too.
    """

    heading: str
    image: bytes
    caption: str


class Kind(NamedTuple):
    """A figure that a report may have.

    Attributes:
        heading: its title.
        applies: whether the groups have data for it.
        draw: figure and groups → drawn.
        caption: of the figure of these groups.
    """

    heading: str
    applies: Callable[[Sequence[Group]], Any]
    draw: Callable[[Any, Sequence[Group]], None]
    caption: Callable[[Sequence[Group]], str]


def draw_figures(groups: Sequence[Group], baseline: str) -> list[Figure]:
    """→ each figure that the groups have data for; the first one shows the answer at a glance.

    Args:
        groups: from `group_results`.
        baseline: label of the group whose loss by position is subtracted.
    """
    over_baseline = Kind(
        f"Loss by position, minus that of {baseline}",
        lambda groups: not groups[0].score_name and len(groups) > 1,
        lambda figure, groups: _loss_over_baseline(figure, groups, baseline),
        lambda groups: _caption_of_difference(groups, baseline),
    )
    kinds = [kind for kind in (over_baseline, *KINDS) if kind.applies(groups)]
    return [Figure(kind.heading, _png(kind, groups), kind.caption(groups)) for kind in kinds]


def draw_group(group: Group) -> tuple[str, bytes]:
    """→ file name and PNG of the one figure of a group: loss by position or, for a task, score by length."""
    name, kind = ("score_by_length", SCORE) if group.score_name else ("loss_by_position", LOSS)
    return f"{name}.png", _png(kind, [group])


def _png(kind: Kind, groups: Sequence[Group]) -> bytes:
    figure = new_figure(*figure_size(len(groups)))
    with figure_style():
        kind.draw(figure, groups)
        figure.suptitle(plain(_text_shown(kind.draw, groups)), fontsize="medium")
        write_caption(figure, kind.caption(groups))
    return figure_png(figure, NUM_COLORS if len(groups) > 1 else FEW_COLORS)


def _text_shown(draw: Callable[[Any, Sequence[Group]], None], groups: Sequence[Group]) -> str:
    """→ which text a figure is about: corpus and split."""
    if draw not in (training_curves, draw_biases):
        return text_title([group.first for group in groups])
    names = dict.fromkeys(group.first["training"].get("corpus", {}).get("name") for group in groups)
    return f"{', '.join(map(str, names))}, split train"


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
            draw_line(axes, curves[0][0], over_seeds(rows), group.label, linewidth=1.8)
    log2_axis(axes, _positions(groups))
    # the first tokens say little, and a few settings that are far off would hide the others
    rows = np.concatenate([line.get_ydata()[2:] for line in axes.get_lines()])
    quarter, three = np.quantile(rows, (0.25, 0.75))
    spread = 4 * (three - quarter)
    low, high = min(max(rows.min(), quarter - spread), 0.0), max(min(rows.max(), three + spread), 0.0)
    margin = 0.08 * (high - low) or 0.01  # curves that are all equal have no height
    axes.set_ylim(low - margin, high + margin)
    finish(axes, groups, xlabel="tokens of context", ylabel=f"loss − loss of {plain(baseline)} (nats per token)")


def _curves_of(group: Group, seed: int) -> tuple[list[float], list[float]]:
    return smooth_by_position(group.by_seed[seed]["loss_by_position"])


def change_figure(groups: Sequence[Group]) -> bytes:
    """→ PNG: how the perplexity changes with the length, by setting, with intervals for new seeds and new text."""
    return _png(CHANGE, groups)


def _change_by_length(figure: Any, groups: Sequence[Group]) -> None:
    """In per cent of the perplexity at the training length, on the same tokens at every length."""
    axes = figure.subplots()
    for group in groups:
        lengths = [length for length in group.lengths() if length >= group.train_length]
        found = [over_documents(changes_between(group.train_length, length)(group), group) for length in lengths]
        style = {"marker": "o", "markersize": 4}
        draw_line(axes, lengths, found, group.label, lambda value: 100 * math.expm1(min(value, 20.0)), **style)
    axes.axhline(0, color="grey", linewidth=1)
    rows = np.concatenate([line.get_ydata() for line in axes.get_lines()[:-1]])
    # the best of them are told apart near 0; what grows without limit leaves the figure
    axes.set_ylim(min(rows.min() * 1.3, -1.0), min(rows.max() * 1.05, MOST_CHANGE))
    log2_axis(axes, sorted({length for group in groups for length in group.lengths() if length >= group.train_length}))
    round_ticks(axes.yaxis, "+", " %")
    labels = {"xlabel": "evaluation length (tokens)", "ylabel": "change of perplexity from the training length"}
    finish(axes, groups, marks=False, **labels)


def _has_longer_lengths(groups: Sequence[Group]) -> bool:
    if groups[0].score_name:
        return False
    return all(group.train_length in group.lengths() and group.train_length < group.lengths()[-1] for group in groups)


def _loss_by_position(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        curves = [smooth_by_position(result["loss_by_position"]) for result in group.by_seed.values()]
        draw_line(axes, curves[0][0], over_seeds([losses for _, losses in curves]), group.label)
    log2_axis(axes, _positions(groups))
    finish(axes, groups, xlabel="tokens of context", ylabel="loss (nats per token)")


def _perplexity_by_length(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        lengths = group.lengths()
        found = [over_documents(group.losses(length), group) for length in lengths]
        style = {"marker": "o", "markersize": 4}
        draw_line(axes, lengths, found, group.label, lambda value: math.exp(min(value, 700.0)), **style)
    axes.set_yscale("log")
    log2_axis(axes, sorted({length for group in groups for length in group.lengths()}))
    exact_labels(axes.yaxis)
    finish(axes, groups, xlabel="evaluation length (tokens)", ylabel="perplexity")


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
            draw_line(axes, list(names), over_seeds(rows), group.label, marker="o", markersize=4)
        lengths = sorted({length for group in groups for length in group.lengths()})
        axes.set(title=plain(kind), ylim=(-0.03, 1.03))
        log2_axis(axes, lengths)
        finish(axes, groups, xlabel="length (tokens)", ylabel=plain(groups[0].score_name))
        if axes is not figure.axes[0]:
            axes.set_ylabel("")
    for axes in list(panels):
        axes.set_axis_off()


# --- captions


def _over_text(groups: Sequence[Group]) -> str:
    if has_held_out_ends(groups[0].first):
        return "for new seeds and no new documents, but other ends of those that were trained on"
    return "for new seeds" + (" and new documents" if len(groups[0].document_weights) > 1 else " on this text")


def _caption_of_difference(groups: Sequence[Group], baseline: str) -> str:
    (base,) = [group for group in groups if group.label == baseline]
    shared = [{seed: run for seed, run in group.by_seed.items() if seed in base.by_seed} for group in groups]
    paired = [Group(group.label, runs) for group, runs in zip(groups, shared) if runs]
    left = left_out(groups, paired, f"no seed is in common with {baseline}")
    return on_this_text(paired, "of the difference, paired by seed, ") + left


def _caption_of_change(groups: Sequence[Group]) -> str:
    return bands(groups, f"of the change itself, {_over_text(groups)}")


def _caption_of_perplexity(groups: Sequence[Group]) -> str:
    text = bands(groups, f"{_over_text(groups)}, as in the table")
    if len(groups) == 1 or text.startswith("One seed"):
        return text
    return f"{text} Settings read the same text: where bands overlap, the paired differences may still be resolved."


def _caption_of_score(groups: Sequence[Group]) -> str:
    return bands(groups, "for new seeds, as in the table")


CHANGE = Kind("Change of perplexity with the length", _has_longer_lengths, _change_by_length, _caption_of_change)
LOSS = Kind("Loss by position", lambda groups: not groups[0].score_name, _loss_by_position, on_this_text)
PERPLEXITY = Kind(
    "Perplexity by length",
    lambda groups: not groups[0].score_name and len(groups[0].lengths()) > 1,
    _perplexity_by_length,
    _caption_of_perplexity,
)
SCORE = Kind("Score by length", lambda groups: groups[0].score_name, _score_by_length, _caption_of_score)
KINDS = (
    CHANGE,
    LOSS,
    PERPLEXITY,
    SCORE,
    Kind("Loss after finetuning", finetuned, finetune_curves, on_this_text),
    Kind("Use of the context by training length", has_training_lengths, context_by_training_length, on_this_text),
    Kind("Training loss", logged, training_curves, caption_of_training),
    Kind("Bias by distance", lambda groups: any(map(bias_curves, groups)), draw_biases, caption_of_biases),
)
