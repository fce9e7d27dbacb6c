"""The style of all figures: names at the lines, colours that everybody can tell apart, lengths in octaves."""

import io
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..environment import write_bytes


# palettes that keep the colours of many lines with their bands, at a third of the bytes; and of a single line
NUM_COLORS = 128
FEW_COLORS = 32
DPI = 90
# of Okabe and Ito (2008), which people with any colour vision can tell apart; then other dashes
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":", "-.")
MANY = 10  # with more lines, their bands are pale
LABEL_HEIGHT = 0.042  # of a label at the end of a line, as a share of a figure of 5 inches


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


@contextmanager
def figure_style() -> Iterator[None]:
    """Lines of a figure that is drawn inside look different from each other, without a frame around them."""
    from cycler import cycler
    from matplotlib import rc_context

    styles = cycler(linestyle=DASHES) * cycler(color=COLORS)
    with rc_context({"axes.prop_cycle": styles, "axes.spines.top": False, "axes.spines.right": False}):
        yield


def figure_size(num_lines: int) -> tuple[float, float]:
    """Width and height in inches: room for the name of each line."""
    return (9, max(5.0, 0.24 * num_lines)) if num_lines > 1 else (5.8, 3.1)


def write_caption(figure: Any, caption: str) -> None:
    """Writes a caption under a figure, in as many lines as its width needs."""
    lines = textwrap.wrap(plain(caption), int(15 * figure.get_figwidth()))
    figure.supxlabel("\n".join(lines), fontsize="small", color="dimgrey")


def exact_labels(axis: Any, sign: str = "", unit: str = "") -> None:
    """Labels of an axis that are the values of their ticks, with the decimals that these need, not rounded ones.

    Args:
        axis: of matplotlib.
        sign: "+" to show it at positive values too.
        unit: what follows the number.
    """
    for formatter in (axis.set_major_formatter, axis.set_minor_formatter):
        formatter(f"{{x:{sign}.10g}}{unit}")


def round_ticks(axis: Any, sign: str = "", unit: str = "") -> None:
    """Ticks of a linear axis at 1, 2 or 5 times a power of ten, with labels as `exact_labels` makes them."""
    axis.get_major_locator().set_params(steps=(1, 2, 5, 10))
    exact_labels(axis, sign, unit)


def finish_axes(axes: Any, train_lengths: Sequence[int] = (), **labels: str) -> None:
    """Names each line at its end, marks the training lengths and sets the labels of the axes."""
    axes.set(**labels)
    for length in sorted(set(train_lengths)):
        axes.axvline(length, color="grey", linestyle=":", linewidth=1)
        axes.text(length, 1.0, " training length", transform=axes.get_xaxis_transform(), va="top", color="grey")
    axes.grid(alpha=0.25)
    lines = [line for line in axes.get_lines() if not line.get_label().startswith("_")]
    if len(lines) > MANY:
        for band in axes.collections:
            band.set_alpha(0.06)
    if len(lines) > 1:
        _label_lines(axes, lines)


def _label_lines(axes: Any, lines: Sequence[Any]) -> None:
    """Writes the name of each line beside its last point; names that would overlap are moved apart."""
    axes.margins(x=0.01)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)  # it stays, whatever is written beside it
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = [to_axes.transform((line.get_xdata()[-1], line.get_ydata()[-1])) for line in lines]
    order = sorted(range(len(lines)), key=lambda index: ends[index][1])
    height = LABEL_HEIGHT * 5 / axes.figure.get_figheight()
    places = [min(max(ends[index][1], 0.0), 1.0) for index in order]
    for _ in range(200):  # pushes neighbours apart until all fit
        for below in range(len(places) - 1):
            overlap = height - (places[below + 1] - places[below])
            if overlap > 0:
                places[below] -= overlap / 2
                places[below + 1] += overlap / 2
    for index, place in zip(order, places):
        line, (x, y) = lines[index], ends[index]
        name = line.get_label() + (" ↑" if y > 1 else " ↓" if y < 0 else "")  # the line ends outside
        y = min(max(y, 0.0), 1.0)
        options = {"xycoords": "axes fraction", "fontsize": 9, "va": "center", "annotation_clip": False}
        arrow = {
            "arrowstyle": "-",
            "color": line.get_color(),
            "linewidth": 0.6,
            "shrinkA": 2,
            "shrinkB": 0,
            "relpos": (0, 0.5),
        }
        place_of_text = (1.04, place)
        axes.annotate(name, (x, y), place_of_text, color=line.get_color(), arrowprops=arrow, **options)


def log2_axis(axes: Any, ticks: Sequence[int]) -> None:
    """Lengths in octaves."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
