"""The figure of the biases that models have learned, by the distance."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .figure_style import plain
from .groups import Group


LARGEST_BIAS = 12.0  # beyond which a softmax is all or nothing
SHOWN_LENGTHS = 4  # training lengths that the figure of biases shows, on a scale where a line is a line


def draw_biases(figure: Any, groups: Sequence[Group]) -> None:
    """One panel for each scheme with a bias, of its first seed: a line for each layer and head."""
    from matplotlib import colormaps

    shown = [group for group in groups if bias_curves(group)]
    columns = min(3, len(shown))
    figure.set_size_inches(9, 3.2 * math.ceil(len(shown) / columns))
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False).flat
    for group, axes in zip(shown, panels):  # in this order: the panels that are left stay in the iterator
        distances, layers = _shown_biases(group)
        for layer, heads in enumerate(layers):
            color = colormaps["viridis"](layer / max(1, len(layers) - 1))
            for head, values in enumerate(heads):
                name = f"layer {layer}" if len(layers) > 1 else "all layers"
                label = name if head == 0 else None
                axes.plot(distances, values, color=color, linewidth=0.9, linestyle="-", label=label)
        title = plain(f"{group.label}, seed {next(iter(group.by_seed))}")
        axes.set(title=title, xlabel="distance (tokens)")
        low, high = axes.get_ylim()
        axes.set_ylim(max(low, -LARGEST_BIAS), min(high, LARGEST_BIAS))
        if group.train_length <= distances[-1]:
            axes.axvline(group.train_length, color="grey", linestyle=":", linewidth=1)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")
    for axes in list(panels):
        axes.set_axis_off()
    figure.axes[0].set_ylabel("bias (added to the scores)")


def _shown_biases(group: Group) -> tuple[np.ndarray, np.ndarray]:
    """→ (N,) distances and (layers, heads, N) biases: up to the last distance where one is within ±12, at most four
    training lengths; one layer where all are the same."""
    curves = bias_curves(group)
    distances, layers = np.array(curves["distances"]), np.array(curves["layers"])
    seen = (np.abs(layers) <= LARGEST_BIAS).any(axis=(0, 1)).nonzero()[0]
    last = distances[seen[-1]] if len(seen) else distances[0]
    near = distances <= max(min(last, SHOWN_LENGTHS * group.train_length), distances[min(8, len(distances) - 1)])
    layers = layers[:1] if (layers == layers[:1]).all() else layers
    return distances[near], layers[..., near]


def bias_curves(group: Group) -> dict[str, Any] | None:
    """What the first seed of a group has learned, if its scheme has a bias."""
    return group.first.get("distance_bias")


def caption_of_biases(groups: Sequence[Group]) -> str:
    """Which seed is shown, of how many."""
    shown = [group for group in groups if bias_curves(group)]
    seeds, count = {next(iter(group.by_seed)) for group in shown}, max(len(group.by_seed) for group in shown)
    which = f"seed {seeds.pop()}" if len(seeds) == 1 else "the first seed of each setting"
    whole = f"{which} alone, of {count} seeds" if count > 1 else which
    return f"A line for each layer and head, of {whole}; no bands. To ±{LARGEST_BIAS:g}, as far as one is within."
