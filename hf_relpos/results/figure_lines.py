"""Lines over seeds with their intervals, and what captions say of these."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .estimates import Estimate
from .figure_style import finish_axes, plain
from .groups import Group
from .questions import Matrix


def draw_line(
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


def over_seeds(rows: Any) -> list[Estimate]:
    """(seeds, points) values → the estimate of each point for new seeds on the same text."""
    return [Estimate.of(column[:, None]) for column in np.asarray(rows, dtype=np.float64).T]


def over_documents(values: Matrix, group: Group) -> Estimate:
    """Of seed → the value of each document: for new seeds and, where documents are known, new documents."""
    return Estimate.of(np.stack([*values.values()]), group.document_weights)


def finish(axes: Any, groups: Sequence[Group], marks: bool = True, **labels: str) -> None:
    """Labels the axes and, with `marks`, the lengths that the groups were trained at."""
    finish_axes(axes, [group.train_length for group in groups if marks and group.train_length], **labels)


def bands(groups: Sequence[Group], words: str) -> str:
    """The words about the bands, unless there are none, with the settings that have none."""
    alone = [group.label for group in groups if len(group.by_seed) == 1]
    if len(alone) == len(groups):
        return "One seed: no bands."
    return f"Bands: 95 % intervals {words}." + (f" One seed, no band: {', '.join(alone)}." if alone else "")


def on_this_text(groups: Sequence[Group], of: str = "") -> str:
    """What bands from `over_seeds` are, for a caption."""
    return bands(groups, f"{of}for new seeds on this text; the spread between documents is left out")


def left_out(groups: Sequence[Group], drawn: Sequence[Group], why: str) -> str:
    """The settings of which there is no line, for a caption; nothing where all are drawn."""
    labels = {group.label for group in drawn}
    names = [group.label for group in groups if group.label not in labels]
    return f" Not drawn, as {why}: {', '.join(names)}." if names else ""
