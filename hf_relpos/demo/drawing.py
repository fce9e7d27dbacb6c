"""What the views of the page share: a model with its name there, templates, and drawings in the page's own colours."""

import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment

from ..inference.request_checks import MAX_PROMPT_TOKENS, check_characters
from ..model.modeling_relpos import RelPosForCausalLM
from ..origin import repository_of


MAX_TOKENS = MAX_PROMPT_TOKENS  # of a pasted text: its logits are in memory at once
COLORS = ("#2f7ed8", "#e0662f", "#159a6c", "#a55fd6", "#d6455d", "#1295a6", "#a8702a", "#7d7f86")  # on white and black
SIZES = (9, 3.9), (3.9, 3.6)  # inches, of a drawing for wide and for narrow windows
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
  .losses td { display: flex; justify-content: space-between; gap: 0.8rem; padding: 0.3rem 0.7rem }
  .losses td:first-child { display: block; border-left: 0 }
  .losses td[data-name]::before { content: attr(data-name); color: var(--quiet); text-align: left }
}
"""
MODEL = """{% macro head(entry) %}<div class="model"><b>{{ entry.scheme }}</b><br>
<span>{{ entry.trained }} · {{ entry.name }}</span></div>{% endmacro %}"""
# a drawing, wide and narrow, and a row for each model
TABLE = """{% if plots %}<div class="figure wide">{{ plots[0]|safe }}</div>
<div class="figure narrow">{{ plots[1]|safe }}</div>{% endif %}
<table class="losses">
<thead><tr><th>model</th>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for entry, cells, error in rows %}<tr style="--model: {{ entry.color }}">
<td>{{ head(entry) }}</td>
{% if error %}<td colspan="{{ columns|length }}"><div class="note">{{ error }}</div></td>
{% else %}{% for cell in cells %}<td data-name="{{ columns[loop.index0] }}">{{ cell }}</td>{% endfor %}{% endif %}</tr>
{% endfor %}</tbody></table>
{% for note in notes %}<p class="quiet">{{ note }}</p>{% endfor %}"""


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
        origin = repository_of((self.model.config.imported_from or {}).get("base_model"))
        return text + (f" on {self.corpus}" if self.corpus else "") + (f", imported from {origin}" if origin else "")


def label(entry: PageModel, entries: Sequence[PageModel]) -> str:
    """The scheme of a model, or its name where another has the same scheme."""
    return entry.scheme if [each.scheme for each in entries].count(entry.scheme) == 1 else entry.name


def render(template: str, **values: Any) -> str:
    """A template of a view → HTML; typed and generated text is escaped."""
    return _compiled(template).render(**values)


@functools.cache
def _compiled(template: str) -> Any:
    return Environment(autoescape=True).from_string(MODEL + template)


def check_text(name: str, text: Any) -> None:
    """Raises `ValueError` for what is no text, or too long to be cut into tokens here."""
    if not isinstance(text, str):
        raise ValueError(f"The {name} must be text, got {type(text).__name__}.")
    check_characters(f"The {name}", len(text), "this page")
    text.encode()  # half of a surrogate pair is no text


def counted(count: int) -> str:
    return f"{count} token{'s' * (count != 1)}"


def svg(draw: Callable[..., None], size: tuple[float, float], label: str, *arguments: Any) -> str:
    """A drawing as SVG in the page's text colour, legible on light and dark."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    stream = io.StringIO()
    with rc_context(PLOT_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes, *arguments)
        for axis in (axes.xaxis, axes.yaxis):
            if axis.get_scale() == "log":  # whose own labels are formulas, which are text here
                axis.set_major_formatter("{x:g}")
                axis.set_minor_formatter("")
        axes.grid(alpha=0.18)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    picture = stream.getvalue().replace(INK, "currentColor")
    return f'<svg role="img" aria-label="{label}"' + picture[picture.index("<svg") + 4 :]


def mark_training(entries: Sequence[PageModel], axes: Any) -> None:
    lengths = sorted({entry.model.config.train_length for entry in entries} - {None})
    for length in lengths:
        axes.axvline(length, color=INK, alpha=0.6, linestyle=":", linewidth=1.2)
        text = f"trained at {length}" if len(lengths) == 1 else str(length)
        axes.text(length, 1.01, text, transform=axes.get_xaxis_transform(), va="bottom", ha="center", fontsize=9)


def legend(axes: Any) -> None:
    """The names of the lines, below the drawing."""
    longest = max(len(line.get_label()) for line in axes.get_lines())
    columns = int(72 * axes.figure.get_figwidth() / (40 + 5.5 * longest))  # points, of a line and its name
    axes.figure.legend(loc="outside lower center", ncols=min(4, max(1, columns)), fontsize=9, frameon=False)
