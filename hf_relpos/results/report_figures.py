"""Figures over seeds: the mean of each group of runs as a line with its name at the end, an interval as a band. The
caption of each says what its bands are."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .bias_figure import bias_curves, caption_of_biases, draw_biases
from .estimates import Estimate
from .figure_style import (
    FEW_COLORS,
    NUM_COLORS,
    exact_labels,
    figure_png,
    figure_size,
    figure_style,
    finish_axes,
    log2_axis,
    new_figure,
    plain,
    round_ticks,
    write_caption,
)
from .groups import Group
from .questions import Matrix, changes_between
from .result_file import has_held_out_ends, smooth_by_position, text_title


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
    if draw not in (_training_curves, draw_biases):
        return text_title([group.first for group in groups])
    names = dict.fromkeys(group.first["training"].get("corpus", {}).get("name") for group in groups)
    return f"{', '.join(map(str, names))}, split train"


def _line(
    axes: Any,
    xs: Sequence[float],
    points: Sequence[Estimate],
    label: str,
    write: Callable[[float], float] = float,
    **style: Any,
) -> None:
    """The means with their 95 % intervals as a band, as they stand in tables; one run has none.

    Args:
        axes, label, style: of matplotlib.
        xs: where the points are.
        points: the points.
        write: what is drawn of a value.
    """
    means, lows, highs = zip(*((write(point.mean), write(point.low), write(point.high)) for point in points))
    (line,) = axes.plot(xs, means, label=plain(label), **style)
    if not np.isnan(lows).any():
        axes.fill_between(xs, lows, highs, color=line.get_color(), alpha=0.15, linewidth=0)


def _over_seeds(rows: Any) -> list[Estimate]:
    """(seeds, points) values → the estimate of each point for new seeds on the same text."""
    return [Estimate.of(column[:, None]) for column in np.asarray(rows, dtype=np.float64).T]


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
            _line(axes, curves[0][0], _over_seeds(rows), group.label, linewidth=1.8)
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
    return _png(CHANGE, groups)


def _change_by_length(figure: Any, groups: Sequence[Group]) -> None:
    """In per cent of the perplexity at the training length, on the same tokens at every length."""
    axes = figure.subplots()
    for group in groups:
        lengths = [length for length in group.lengths() if length >= group.train_length]
        found = [_estimate(changes_between(group.train_length, length)(group), group) for length in lengths]
        style = {"marker": "o", "markersize": 4}
        _line(axes, lengths, found, group.label, lambda value: 100 * math.expm1(min(value, 20.0)), **style)
    axes.axhline(0, color="grey", linewidth=1)
    rows = np.concatenate([line.get_ydata() for line in axes.get_lines()[:-1]])
    # the best of them are told apart near 0; what grows without limit leaves the figure
    axes.set_ylim(min(rows.min() * 1.3, -1.0), min(rows.max() * 1.05, MOST_CHANGE))
    log2_axis(axes, sorted({length for group in groups for length in group.lengths() if length >= group.train_length}))
    round_ticks(axes.yaxis, "+", " %")
    labels = {"xlabel": "evaluation length (tokens)", "ylabel": "change of perplexity from the training length"}
    _finish(axes, groups, marks=False, **labels)


def _estimate(values: Matrix, group: Group) -> Estimate:
    """Of seed → the value of each document: for new seeds and, where documents are known, new documents."""
    return Estimate.of(np.stack([*values.values()]), group.document_weights)


def _has_longer_lengths(groups: Sequence[Group]) -> bool:
    if groups[0].score_name:
        return False
    return all(group.train_length in group.lengths() and group.train_length < group.lengths()[-1] for group in groups)


def _loss_by_position(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        curves = [smooth_by_position(result["loss_by_position"]) for result in group.by_seed.values()]
        _line(axes, curves[0][0], _over_seeds([losses for _, losses in curves]), group.label)
    log2_axis(axes, _positions(groups))
    _finish(axes, groups, xlabel="tokens of context", ylabel="loss (nats per token)")


def _perplexity_by_length(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        lengths = group.lengths()
        found = [_estimate(group.losses(length), group) for length in lengths]
        _line(axes, lengths, found, group.label, lambda value: math.exp(min(value, 700.0)), marker="o", markersize=4)
    axes.set_yscale("log")
    log2_axis(axes, sorted({length for group in groups for length in group.lengths()}))
    exact_labels(axes.yaxis)
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
            _line(axes, list(names), _over_seeds(rows), group.label, marker="o", markersize=4)
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
    for group in _logged(groups):
        steps, logs = _shared_steps(group), [_log(result) for result in group.by_seed.values()]
        _line(axes, steps, _over_seeds([[log[step] for step in steps] for log in logs]), group.label)
    _finish(axes, groups, marks=False, xlabel="step", ylabel="training loss (nats per token)")


def _log(result: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in result["training"].get("log", []) if "loss" in entry}


def _shared_steps(group: Group) -> list[int]:
    """The steps whose loss all seeds of a group logged."""
    return sorted(set.intersection(*(set(_log(result)) for result in group.by_seed.values())))


def _logged(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if _shared_steps(group)]


def _finetune_curves(figure: Any, groups: Sequence[Group]) -> None:
    """A line for each setting over its steps; a setting that was finetuned for one number of steps is a point."""
    axes = figure.subplots()
    curves: dict[str, dict[int, list[float]]] = {}
    untrained: dict[str, list[float]] = {}  # which have no new length of their own
    for group in _finetuned(groups):
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
        found = _over_seeds(np.array([points[step] for step in steps]).T)
        _line(axes, steps, found, name, marker="o", markersize=4)
    length, places = groups[0].lengths()[-1], sorted({step for points in curves.values() for step in points})
    axes.set_xscale("symlog", linthresh=min(filter(None, places), default=1))  # 0 steps are the model as it was
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.set_xticks([], minor=True)
    _finish(axes, groups, marks=False, xlabel="finetuning steps", ylabel=f"loss at {length} (nats per token)")


def _setting_alone(group: Group, *left_out: str) -> str:
    """ "rotary rope_type=yarn, factor=8.0": the label without some of its fields."""
    return " ".join(word for name, word in group.words.items() if word and name not in left_out)


def _finetuned(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.first["training"].get("base_train_length")]


def _context_by_training_length(figure: Any, groups: Sequence[Group]) -> None:
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
                _line(axes, [*found], _over_seeds(rows), setting, marker="o", markersize=4)
        log2_axis(axes, lengths)
        _finish(axes, groups, marks=False, xlabel="training length (tokens)", ylabel=name)


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


def _has_training_lengths(groups: Sequence[Group]) -> bool:
    if _finetuned(groups) or not _by_setting(groups):
        return False
    return any(group.in_context_scores() for group in groups) and any(group.slopes() for group in groups)


# --- captions


def _bands(groups: Sequence[Group], words: str) -> str:
    """The words about the bands, unless there are none, with the settings that have none."""
    alone = [group.label for group in groups if len(group.by_seed) == 1]
    if len(alone) == len(groups):
        return "One seed: no bands."
    return f"Bands: 95 % intervals {words}." + (f" One seed, no band: {', '.join(alone)}." if alone else "")


def _over_text(groups: Sequence[Group]) -> str:
    if has_held_out_ends(groups[0].first):
        return "for new seeds and no new documents, but other ends of those that were trained on"
    return "for new seeds" + (" and new documents" if len(groups[0].document_weights) > 1 else " on this text")


def _on_this_text(groups: Sequence[Group], of: str = "") -> str:
    return _bands(groups, f"{of}for new seeds on this text; the spread between documents is left out")


def _caption_of_difference(groups: Sequence[Group], baseline: str) -> str:
    (base,) = [group for group in groups if group.label == baseline]
    shared = [{seed: run for seed, run in group.by_seed.items() if seed in base.by_seed} for group in groups]
    paired = [Group(group.label, runs) for group, runs in zip(groups, shared) if runs]
    left = _left_out(groups, paired, f"no seed is in common with {baseline}")
    return _on_this_text(paired, "of the difference, paired by seed, ") + left


def _left_out(groups: Sequence[Group], drawn: Sequence[Group], why: str) -> str:
    """The settings of which there is no line."""
    labels = {group.label for group in drawn}
    names = [group.label for group in groups if group.label not in labels]
    return f" Not drawn, as {why}: {', '.join(names)}." if names else ""


def _caption_of_change(groups: Sequence[Group]) -> str:
    return _bands(groups, f"of the change itself, {_over_text(groups)}")


def _caption_of_perplexity(groups: Sequence[Group]) -> str:
    text = _bands(groups, f"{_over_text(groups)}, as in the table")
    if len(groups) == 1 or text.startswith("One seed"):
        return text
    return f"{text} Settings read the same text: where bands overlap, the paired differences may still be resolved."


def _caption_of_score(groups: Sequence[Group]) -> str:
    return _bands(groups, "for new seeds, as in the table")


def _caption_of_training(groups: Sequence[Group]) -> str:
    drawn = _logged(groups)
    return _bands(drawn, "for new seeds") + _left_out(groups, drawn, "no step was logged by all seeds")


CHANGE = Kind("Change of perplexity with the length", _has_longer_lengths, _change_by_length, _caption_of_change)
LOSS = Kind("Loss by position", lambda groups: not groups[0].score_name, _loss_by_position, _on_this_text)
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
    Kind("Loss after finetuning", _finetuned, _finetune_curves, _on_this_text),
    Kind("Use of the context by training length", _has_training_lengths, _context_by_training_length, _on_this_text),
    Kind(
        "Training loss",
        _logged,
        _training_curves,
        _caption_of_training,
    ),
    Kind("Bias by distance", lambda groups: any(map(bias_curves, groups)), draw_biases, caption_of_biases),
)
