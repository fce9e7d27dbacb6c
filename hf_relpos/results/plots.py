"""Plots of result files, one line per run."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .figure_style import (
    FEW_COLORS,
    NUM_COLORS,
    exact_labels,
    figure_size,
    figure_style,
    finish_axes,
    log2_axis,
    new_figure,
    plain,
    save_figure,
)
from .result_file import labels, score_cells, smooth_by_position, text_title


def plot_results(results: Sequence[dict[str, Any]], folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Draws loss by position and perplexity by length, one line per run.

    Args:
        results: any number of runs.
        folder: where the figures go.
        names: what to call each run; by default `labels`.

    Returns:
        the paths of `loss_by_position.png` and `perplexity_by_length.png` in `folder`.
    """
    names = names or labels(results)
    return [
        _draw(_loss_by_position, results, names, folder / "loss_by_position.png"),
        _draw(_perplexity_by_length, results, names, folder / "perplexity_by_length.png"),
    ]


def plot_scores(results: Sequence[dict[str, Any]], folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Draws the scores of a task by length, one line per run and kind of row; → the path of `score_by_length.png`."""
    return [_draw(_score_by_length, results, names or labels(results), folder / "score_by_length.png")]


def _draw(draw: Any, results: Sequence[dict[str, Any]], names: Sequence[str], path: Path) -> Path:
    figure = new_figure(*figure_size(len(results)))
    with figure_style():
        axes = figure.subplots()
        said = draw(axes, results, names)
        finish_axes(axes, [result["train_length"] for result in results if result["train_length"]], **said)
        figure.suptitle(plain(text_title(results)), fontsize="medium")
    save_figure(figure, path, NUM_COLORS if len(results) > 1 else FEW_COLORS)
    return path


def _loss_by_position(axes: Any, results: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    curves = [smooth_by_position(result["loss_by_position"]) for result in results]
    for name, (positions, losses) in zip(names, curves):
        axes.plot(positions, losses, label=plain(name))
    octaves = range(math.ceil(math.log2(max(positions[-1] for positions, _ in curves))) + 1)
    log2_axis(axes, [2**octave for octave in octaves])
    return {"xlabel": "tokens of context", "ylabel": "loss (nats per token)"}


def _perplexity_by_length(axes: Any, results: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    for name, result in zip(names, results):
        lengths = sorted(int(length) for length in result["lengths"])
        perplexities = [result["lengths"][str(length)]["perplexity"] for length in lengths]
        axes.plot(lengths, perplexities, marker="o", markersize=4, label=plain(name))
    log2_axis(axes, _lengths(results))
    low, high = axes.get_ylim()
    if high > 3 * low:
        axes.set_yscale("log")
        exact_labels(axes.yaxis)
    elif high < 1.05 * low:  # a flat line should look flat
        axes.set_ylim(0.975 * low, 1.025 * high)
    return {"xlabel": "evaluation length (tokens)", "ylabel": "perplexity, same target tokens"}


def _score_by_length(axes: Any, results: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, str]:
    for name, result in zip(names, results):
        lines: dict[str, dict[int, float]] = {}
        for condition, cell in score_cells(result).items():
            length, _, kind = condition.partition(" ")
            lines.setdefault(f"{name} {kind}".strip(), {})[int(length)] = cell["score"]
        for label, points in lines.items():
            axes.plot(list(points), list(points.values()), marker="o", markersize=4, label=plain(label))
    axes.set_ylim(-0.03, 1.03)
    log2_axis(axes, _lengths(results))
    return {"xlabel": "length (tokens)", "ylabel": plain(results[0]["score_name"])}


def _lengths(results: Sequence[dict[str, Any]]) -> list[int]:
    return sorted({int(length) for result in results for length in result["lengths"]})
