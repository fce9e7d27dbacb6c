"""The view of the biases: what attention adds to the scores of keys by their distance."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..evaluation.evaluate import bias_curve_limit
from ..inference.request_checks import check_number
from .drawing import COLORS, LINES, PageModel, legend, mark_training, render, svg


MAX_DISTANCES = 8192  # which a request that does not come from the page need not keep
SCALES = ("linear", "logarithmic")
MAX_POINTS = 400  # of a drawn curve
BIASES = """<div class="cards curves">{% for entry, plot, note in rows %}
<section class="card" style="--model: {{ entry.color }}">{{ head(entry) }}
{% if plot %}<div class="figure">{{ plot|safe }}</div>{% endif %}{% if note %}<p>{{ note }}</p>{% endif %}
</section>{% endfor %}</div>"""


def bias_page(entries: Sequence[PageModel], layer: int, length: int, scale: str) -> str:
    """→ a plot per model with a line per head: what its attention adds to the scores by distance, in one layer."""
    try:
        check_number("layer", layer, 0, 10**6)
        check_number("length", length, 2, MAX_DISTANCES)
        if scale not in SCALES:
            raise ValueError(f"The axis must be one of {SCALES}, got {str(scale)[:40]!r}.")
    except ValueError as error:
        return render(BIASES, rows=[(entry, "", str(error)) for entry in entries])
    rows, layer, length = [], int(layer), int(length)
    for entry in entries:
        num_layers = entry.model.config.num_hidden_layers
        plot, note = "", ""
        if not entry.model.config.has_distance_table:
            note = f"No curve: {entry.scheme} adds no bias by distance to the scores."
        elif layer >= num_layers:
            note = f"No layer {layer}: this model has layers 0 to {num_layers - 1}."
        else:
            limit = bias_curve_limit([entry.model.model.layers[layer]])
            if limit < length - 1:
                note = f"Up to distance {limit}: past position {limit} the bias depends on the query's position too."
            with torch.no_grad():
                table = entry.model.model.distance_bias(int(min(length, limit + 1)))[layer].cpu().numpy()
            plot = svg(draw_bias, (4.4, 3.6), f"Bias by distance, layer {layer}", entry, table, scale)
        rows.append((entry, plot, note))
    return render(BIASES, rows=sorted(rows, key=lambda row: not row[1]))  # curves first


def draw_bias(axes: Any, entry: PageModel, table: np.ndarray, scale: str) -> None:
    spread = np.geomspace if scale == "logarithmic" else np.linspace
    distances = np.unique(spread(1, table.shape[1], min(MAX_POINTS, table.shape[1])).round().astype(int)) - 1
    shift = int(scale == "logarithmic")
    for head, values in enumerate(table):
        style = {"color": COLORS[head % len(COLORS)], "linestyle": LINES[head // len(COLORS) % len(LINES)]}
        axes.plot(distances + shift, values[distances], label=f"head {head}", **style)
    if shift:
        axes.set_xscale("log", base=2)
    axes.set(xlabel="distance + 1 (tokens)" if shift else "distance (tokens)", ylabel="bias (added to the scores)")
    if (entry.model.config.train_length or 0) <= table.shape[1]:
        mark_training([entry], axes)
    legend(axes)
