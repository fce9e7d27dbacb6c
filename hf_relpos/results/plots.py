"""Plots of result files, one line per run, and the one function that saves a figure."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..environment import write_bytes
from .result_file import labels, score_cells, smooth_by_position, text_title


# palettes that keep the colours of many lines with their bands, at a third of the bytes; and of a single line
NUM_COLORS = 128
FEW_COLORS = 32
DPI = 90


def new_figure(width: float, height: float) -> Any:
    """→ an empty matplotlib figure of this size in inches, which needs no display and is known to no pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def figure_png(figure: Any, num_colors: int = NUM_COLORS) -> bytes:
    """→ the figure as a small PNG: moderate resolution, a palette, and no metadata that changes between versions."""
    from PIL import Image

    rendered, stream = io.BytesIO(), io.BytesIO()
    figure.savefig(rendered, dpi=DPI, format="png")
    with Image.open(rendered) as image:
        palette = image.convert("RGB").quantize(num_colors, dither=Image.Dither.NONE)
    palette.save(stream, format="PNG", optimize=True)
    return stream.getvalue()


def save_figure(figure: Any, path: Path, num_colors: int = NUM_COLORS) -> None:
    """Writes the figure as a small PNG, making the folder where it is missing."""
    write_bytes(path, figure_png(figure, num_colors))


def plain(name: Any) -> str:
    """A name as a label of a figure: matplotlib takes what stands between two dollars for mathematics."""
    return str(name).replace("$", r"\$")


def plot_results(results: Sequence[dict[str, Any]], folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Draws loss by position and perplexity by length, one line per run.

    Args:
        results: any number of runs.
        folder: where the figures go.
        names: what to call each run; by default `labels`.

    Returns:
        the paths of `loss_by_position.png` and `perplexity_by_length.png` in `folder`.
    """
    paths = [folder / "loss_by_position.png", folder / "perplexity_by_length.png"]
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    curves = [smooth_by_position(result["loss_by_position"]) for result in results]
    for name, (positions, losses) in zip(names or labels(results), curves):
        axes.plot(positions, losses, label=plain(name))
    axes.set(xscale="log", xlabel="position (tokens of context)", ylabel="loss (nats per token)")
    octaves = range(math.ceil(math.log2(max(positions[-1] for positions, _ in curves))) + 1)
    _label_ticks(axes, [2**octave for octave in octaves])
    _finish(figure, axes, results, paths[0])

    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for name, result in zip(names or labels(results), results):
        lengths = sorted(int(length) for length in result["lengths"])
        perplexities = [result["lengths"][str(length)]["perplexity"] for length in lengths]
        axes.plot(lengths, perplexities, marker="o", label=plain(name))
    axes.set(xscale="log", xlabel="evaluation length (tokens)", ylabel="perplexity, same target tokens")
    _label_ticks(axes, sorted({int(length) for result in results for length in result["lengths"]}))
    low, high = axes.get_ylim()
    if high > 3 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.0f}")
    elif high < 1.05 * low:  # a flat line should look flat
        axes.set_ylim(0.975 * low, 1.025 * high)
    _finish(figure, axes, results, paths[1])
    return paths


def plot_scores(results: Sequence[dict[str, Any]], folder: Path, names: Sequence[str] | None = None) -> list[Path]:
    """Draws the scores of a task by length, one line per run and kind of row; → the path of `score_by_length.png`."""
    figure = new_figure(8, 4.5)
    axes = figure.subplots()
    for name, result in zip(names or labels(results), results):
        lines: dict[str, dict[int, float]] = {}
        for condition, cell in score_cells(result).items():
            length, _, kind = condition.partition(" ")
            lines.setdefault(f"{name} {kind}".strip(), {})[int(length)] = cell["score"]
        for label, points in lines.items():
            axes.plot(list(points), list(points.values()), marker="o", label=plain(label))
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="length (tokens)", ylabel=plain(results[0]["score_name"]))
    _label_ticks(axes, sorted({int(length) for result in results for length in result["lengths"]}))
    path = folder / "score_by_length.png"
    _finish(figure, axes, results, path)
    return [path]


def _label_ticks(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _finish(figure: Any, axes: Any, results: Sequence[dict[str, Any]], path: Path) -> None:
    for length in sorted({result["train_length"] for result in results if result["train_length"]}):
        axes.axvline(length, color="grey", linestyle=":", linewidth=1)
        axes.text(length, 0.98, " trained length", transform=axes.get_xaxis_transform(), va="top", color="grey")
    axes.grid(alpha=0.3)
    axes.set_title(plain(text_title(results)), fontsize="medium")
    axes.legend()
    save_figure(figure, path, NUM_COLORS if len(results) > 1 else FEW_COLORS)
