"""What the demo page shows, as HTML and SVG: text, loss by position and bias by distance of models side by side."""

import functools
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jinja2 import Environment

from ..evaluation.evaluate import bias_curve_limit
from ..evaluation.loss_by_length import evaluation_mode, token_losses
from ..evaluation.loss_sums import RunningLoss
from ..inference.generate import sample
from ..inference.request_checks import MAX_PROMPT_TOKENS, check_characters, check_number
from ..model.modeling_relpos import RelPosForCausalLM
from ..results.result_file import smooth_by_position


MAX_TOKENS = MAX_PROMPT_TOKENS  # of a pasted text: its logits are in memory at once
# the controls' limits, which a request that does not come from the page need not keep
MAX_NEW_TOKENS, MAX_TEMPERATURE, MAX_SEED, MAX_DISTANCES = 1024, 2, 2**32 - 1, 8192
SCALES = ("linear", "logarithmic")
MAX_POINTS = 400  # of a drawn curve
COLORS = ("#2f7ed8", "#e0662f", "#159a6c", "#a55fd6", "#d6455d", "#1295a6", "#a8702a", "#7d7f86")  # on white and black
LINES = ("-", "--", ":", "-.")
INK = "#010203"  # stands for the page's text colour in a drawing
PLOT_STYLE = {"svg.fonttype": "none", "font.size": 10, "text.parse_math": False, "axes.edgecolor": INK}
PLOT_STYLE |= {f"{name}color": INK for name in ("text.", "axes.label", "xtick.", "ytick.", "grid.")}
CSS = """
.html-container { padding: 0 !important; --quiet: color-mix(in srgb, var(--body-text-color) 68%, transparent) }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1rem }
.cards.curves { grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); align-items: start }
.card { border-style: solid; border-width: 4px 1px 1px; border-radius: 0.5rem; padding: 0.8rem 1rem; min-width: 0;
  background: var(--block-background-fill) }
.card { border-color: var(--model) var(--border-color-primary) var(--border-color-primary) }
.card p { margin: 0.6rem 0 0 } .model { overflow-wrap: anywhere } .model b { font-size: 1.05rem }
.model span, .quiet { color: var(--quiet); font-size: 0.85rem }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0.6rem 0; min-height: 9rem; line-height: 1.55 }
.text i { font-style: normal; color: var(--quiet) }
.note { border-left: 3px solid #e0662f; padding-left: 0.6rem; margin: 0.5rem 0; overflow-wrap: anywhere }
.figure svg { width: 100%; height: auto; max-width: 60rem; display: block; margin: 0.5rem auto }
.figure text { font-family: inherit !important }
.figure.narrow { display: none }
.losses { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: 1rem 0 0.6rem }
.losses th, .losses td { border-bottom: 1px solid var(--border-color-primary); padding: 0.45rem 0.7rem }
.losses th, .losses td { text-align: right }
.losses th { font-weight: 600; font-size: 0.85rem; vertical-align: bottom }
.losses th:first-child, .losses td:first-child, .losses td[colspan] { text-align: left }
.losses td:first-child { border-left: 4px solid var(--model) }
@media (max-width: 640px) {
  .figure.wide, .losses thead { display: none } .figure.narrow { display: block }
  .losses tr { display: block; border-left: 4px solid var(--model); margin-bottom: 1rem }
  .losses td { display: flex; justify-content: space-between; padding: 0.3rem 0.7rem }
  .losses td:first-child { display: block; border-left: 0 }
  .losses td[data-name]::before { content: attr(data-name); color: var(--quiet) }
}
"""
MODEL = """{% macro head(entry) %}<div class="model"><b>{{ entry.scheme }}</b><br>
<span>{{ entry.trained }} · {{ entry.name }}</span></div>{% endmacro %}"""
CARDS = """<div class="cards">{% for entry, prompt, text, note, error in rows %}
<section class="card" style="--model: {{ entry.color }}">{{ head(entry) }}
<div class="text"><i>{{ prompt }}</i>{{ text }}</div>
{% if error %}<div class="note">{{ error }}</div>{% else %}<div class="quiet">{{ note }}</div>{% endif %}
</section>{% endfor %}</div>"""
LOSSES = """{% if plots %}<div class="figure wide">{{ plots[0]|safe }}</div>
<div class="figure narrow">{{ plots[1]|safe }}</div>{% endif %}
<table class="losses">
<thead><tr><th>model</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for entry, cells, error in rows %}<tr style="--model: {{ entry.color }}">
<td>{{ head(entry) }}</td>
{% if error %}<td colspan="{{ columns|length }}"><div class="note">{{ error }}</div></td>
{% else %}{% for cell in cells %}<td data-name="{{ columns[loop.index0] }}">{{ cell }}</td>{% endfor %}{% endif %}</tr>
{% endfor %}</tbody></table>
<p class="quiet">{{ note }}</p>"""
BIASES = """<div class="cards curves">{% for entry, plot, note in rows %}
<section class="card" style="--model: {{ entry.color }}">{{ head(entry) }}
{% if plot %}<div class="figure">{{ plot|safe }}</div>{% endif %}{% if note %}<p>{{ note }}</p>{% endif %}
</section>{% endfor %}</div>"""


@dataclass
class PageModel:
    """A model of the page, with what it is called there: scheme, training length, corpus and folder name."""

    name: str
    model: RelPosForCausalLM
    tokenizer: Any
    color: str
    corpus: str | None = None

    @property
    def scheme(self) -> str:
        return self.model.config.pos_embedding_type

    @property
    def trained(self) -> str:
        length = self.model.config.train_length
        text = f"trained at {length} tokens" if length else "training length unknown"
        return f"{text} on {self.corpus}" if self.corpus else text


def render(template: str, **values: Any) -> str:
    """A template of this file → HTML; typed and generated text is escaped."""
    return _compiled(template).render(**values)


@functools.cache
def _compiled(template: str) -> Any:
    return Environment(autoescape=True).from_string(MODEL + template)


# --- text


def generate_cards(
    entries: Sequence[PageModel], prompt: str, max_new_tokens: int, temperature: float, top_p: float, seed: int
) -> Iterator[str]:
    """→ the page's columns after each round of one token per model; an error of a model is shown in its column."""
    try:
        _check_text("prompt", prompt)
        for name, value, least, most in (
            ("max_new_tokens", max_new_tokens, 1, MAX_NEW_TOKENS),
            ("temperature", temperature, 0, MAX_TEMPERATURE),
            ("top_p", top_p, 0.01, 1),
            ("seed", seed, 0, MAX_SEED),
        ):
            check_number(name, value, least, most)
        options = int(max_new_tokens), _temperature(temperature), float(top_p), int(seed)
    except ValueError as error:
        yield render(CARDS, rows=[[entry, "", "", "", str(error)] for entry in entries])
        return
    streams = {index: _sample(entry, prompt, *options) for index, entry in enumerate(entries)}
    counts, rows = [0] * len(entries), [[entry, prompt, "", "…", ""] for entry in entries]
    while streams:
        for index in list(streams):
            row = rows[index]
            try:
                tokens, row[2] = next(streams[index])
                counts[index], row[3] = len(tokens), _counted(len(tokens))
            except StopIteration:
                del streams[index]
                if counts[index] < options[0]:
                    row[3] = f"{_counted(counts[index])}, then the end of the document"
            except ValueError as error:
                del streams[index]
                row[4] = str(error)
        yield render(CARDS, rows=rows)


def _sample(entry: PageModel, prompt: str, *options: Any) -> Iterator[tuple[list[int], str]]:
    count = len(entry.tokenizer(prompt, verbose=False)["input_ids"])
    if count > MAX_TOKENS:
        raise ValueError(f"The prompt has {count} tokens: this page reads at most {MAX_TOKENS}.")
    yield from sample(entry.model, entry.tokenizer, prompt, *options)


def _check_text(name: str, text: Any) -> None:
    """Raises `ValueError` for what is no text, or too long to be cut into tokens here."""
    if not isinstance(text, str):
        raise ValueError(f"The {name} must be text, got {type(text).__name__}.")
    check_characters(f"The {name}", len(text), "this page")
    text.encode()  # half of a surrogate pair is no text


def _temperature(value: float) -> float:
    """A temperature that divides logits by next to nothing takes the likeliest token, as 0 does."""
    return 0.0 if value < 0.01 else float(value)


def _counted(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


# --- loss by position


def losses_by_position(entry: PageModel, text: str) -> np.ndarray:
    """The loss of each token of `text` given all before it.

    Returns:
        (tokens,) nats; the first one is NaN: nothing comes before it.

    Raises:
        ValueError: if the text is too short for a loss, or too long for the model or this page.
    """
    _check_text("text", text)
    tokens = entry.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    count, limit = tokens.shape[1], entry.model.config.max_positions
    if count < 2:
        raise ValueError(f"The text has {_counted(count)}: a loss needs at least 2.")
    if limit is not None and count > limit:
        raise ValueError(f"The text has {count} tokens, past the {limit} positions of the learned table.")
    if count > MAX_TOKENS:
        raise ValueError(f"The text has {count} tokens: this page reads at most {MAX_TOKENS}.")
    with evaluation_mode(entry.model):
        return token_losses(entry.model, tokens.long())[0].numpy()


def losses_page(entries: Sequence[PageModel], text: str) -> str:
    """→ the plot of all models' losses by position, and a table of their perplexities."""
    rows, curves = [], []
    for entry in entries:
        try:
            losses = losses_by_position(entry, text)
        except ValueError as error:
            rows.append((entry, (), str(error)))
            continue
        curves.append((entry, losses))
        length = entry.model.config.train_length or len(losses)
        cells = [_perplexity(part) for part in (losses, losses[:length], losses[length:])]
        rows.append((entry, (len(losses), f"{np.nanmean(losses, dtype=np.float64):.3f}", *cells), ""))
    note = (
        "Faint: each token. Strong: means over a quarter of an octave. Dotted: the training length." if curves else ""
    )
    note += " The text is the one above, no split of a corpus."
    if len({len(losses) for _, losses in curves}) > 1:
        note += " The tokenizers cut the text differently: perplexities per token cannot be compared."
    plots = [_svg(_draw_losses, size, "Loss by position", curves) for size in ((9, 3.9), (4.6, 3.8)) if curves]
    columns = ("tokens", "loss (nats per token)", "perplexity", "of it within the training length", "of it past that")
    return render(LOSSES, plots=plots, rows=rows, columns=columns, note=note)


def _perplexity(losses: np.ndarray) -> str:
    running = RunningLoss()
    running.add(losses)
    return f"{running.summary()['perplexity']:.4g}" if running.count else "–"


def _draw_losses(axes: Any, curves: Sequence[tuple[PageModel, np.ndarray]]) -> None:
    for entry, losses in curves:
        axes.plot(np.arange(1, len(losses)), losses[1:], color=entry.color, alpha=0.22, linewidth=0.8)
    for entry, losses in curves:
        positions, means = smooth_by_position([None, *losses[1:].tolist()])
        axes.plot(positions, means, color=entry.color, linewidth=2, marker="" if len(means) > 1 else "o")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="position (tokens of context)", ylabel="loss (nats per token)")
    _mark_training([entry for entry, _ in curves], axes)


# --- bias by distance


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
            plot = _svg(_draw_bias, (5, 3.8), f"Bias by distance, layer {layer}", entry, table, scale)
        rows.append((entry, plot, note))
    return render(BIASES, rows=sorted(rows, key=lambda row: not row[1]))  # curves first


def _draw_bias(axes: Any, entry: PageModel, table: np.ndarray, scale: str) -> None:
    spread = np.geomspace if scale == "logarithmic" else np.linspace
    distances = np.unique(spread(1, table.shape[1], min(MAX_POINTS, table.shape[1])).round().astype(int)) - 1
    shift = int(scale == "logarithmic")
    for head, values in enumerate(table):
        style = {"color": COLORS[head % len(COLORS)], "linestyle": LINES[head // len(COLORS) % len(LINES)]}
        axes.plot(distances + shift, values[distances], label=f"head {head}", **style)
    if shift:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel="distance + 1 (tokens)" if shift else "distance (tokens)", ylabel="bias (added to the scores)")
    if (entry.model.config.train_length or 0) <= table.shape[1]:
        _mark_training([entry], axes)
    axes.figure.legend(loc="outside lower center", ncols=4, fontsize=9, frameon=False)


# --- drawing


def _svg(draw: Callable[..., None], size: tuple[float, float], label: str, *arguments: Any) -> str:
    """A drawing as SVG in the page's text colour, legible on light and dark."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes, *arguments)
        axes.grid(alpha=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = stream.getvalue().replace(INK, "currentColor")
    return f'<svg role="img" aria-label="{label}"' + picture[picture.index("<svg") + 4 :]


def _mark_training(entries: Sequence[PageModel], axes: Any) -> None:
    lengths = sorted({entry.model.config.train_length for entry in entries} - {None})
    for length in lengths:
        axes.axvline(length, color=INK, alpha=0.6, linestyle=":", linewidth=1.2)
        text = f"trained at {length}" if len(lengths) == 1 else str(length)
        axes.text(length, 1.01, text, transform=axes.get_xaxis_transform(), va="bottom", ha="center", fontsize=9)
