"""A report as Markdown beside its figures, and as one HTML file."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .result_file import escape_markdown, markdown


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { --text: #1a1a1a; --faint: #666; --line: #ddd; --page: #fff; --mark: #0b5cad }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e6e6; --faint: #a0a0a0; --line: #3a3a3a; --page: #16181c; --mark: #7cb7f5 }
}
body { font: 16px/1.55 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: var(--text); background: var(--page); overflow-wrap: anywhere }
h1 { line-height: 1.2 }
h2 { margin-top: 2.2rem; font-size: 1.2rem }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.82rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid var(--line); padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--page) }
img { max-width: 100%; background: #fff; border-radius: 4px }
td small { color: var(--faint) }
td.resolved { font-weight: 600; color: var(--mark) }
.answer { font-size: 1.05rem; border-left: 4px solid var(--mark); padding-left: 1rem }
.note, .summary, footer { color: var(--faint); font-size: 0.9rem }
details { border-top: 1px solid var(--line); padding: 0.5rem 0 }
summary { cursor: pointer; font-weight: 600 }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p class="summary">{{ summary }}</p>
{% for section in sections %}
{% if section.is_detail %}<details><summary>{{ section.heading }}</summary>
{% else %}<h2>{{ section.heading }}</h2>{% endif %}
{% if section.is_answer %}<div class="answer">{% endif %}
{% for note in section.notes %}<p{% if not section.is_answer %} class="note"{% endif %}>
{%- for bold, words in section.parts(note) -%}
{% if bold %}<b>{{ words }}</b>{% else %}{{ words }}{% endif %}
{%- endfor -%}
</p>{% endfor %}
{% if section.is_answer %}</div>{% endif %}
{% if section.image %}<img alt="{{ section.alt }}" src="data:image/png;base64,{{ section.encoded }}">{% endif %}
{% if section.rows %}<table>
<thead><tr>{% for cell in section.rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in section.rows[1:] %}<tr>{% for cell in row %}
{% set value, bracket, interval = section.split(cell, loop.first) %}
<td{% if not loop.first and cell.endswith("*") %} class="resolved"{% endif %}>{{ value }}
{%- if bracket %}<br><small>({{ interval }}</small>{% endif %}</td>
{%- endfor %}</tr>{% endfor %}</tbody>
</table>{% endif %}
{% if section.is_detail %}</details>{% endif %}
{% endfor %}
<footer><p>{{ footer }}</p></footer>
</body>
</html>
"""


@dataclass
class Section:
    """A part of a report.

    Attributes:
        heading: its title.
        notes: sentences; what stands between two "**" is bold in an answer.
        rows: of a table, the head first.
        image: PNG of a figure.
        caption: what a figure shows; it stands in the image, and here for who does not see it.
        is_detail: whether it is folded away in the page.
    """

    heading: str
    notes: list[str] = field(default_factory=list)
    rows: list[list[str]] | None = None
    image: bytes | None = None
    caption: str = ""
    is_detail: bool = False

    @property
    def is_answer(self) -> bool:
        """Whether it holds nothing but sentences."""
        return self.rows is None and self.image is None

    @property
    def file_name(self) -> str:
        """Of the figure beside the Markdown."""
        words = re.sub(r"[^a-z0-9]+", "_", self.heading.partition(",")[0].lower()).strip("_")
        return f"{words}{'_difference' if 'minus' in self.heading else ''}.png"

    @property
    def alt(self) -> str:
        """Heading and caption of a figure, as words."""
        return ". ".join(filter(None, (self.heading, self.caption)))

    @property
    def encoded(self) -> str:
        return base64.b64encode(self.image or b"").decode()

    def parts(self, note: str) -> list[tuple[bool, str]]:
        """→ pieces of a sentence, each with whether it is bold."""
        pieces = note.split("**") if self.is_answer else [note]
        return [(index % 2 == 1, piece) for index, piece in enumerate(pieces)]

    @staticmethod
    def split(cell: str, is_name: bool) -> tuple[str, str, str]:
        """→ a number and its interval, which stands on a line of its own."""
        return (cell, "", "") if is_name else cell.partition(" (")


def as_markdown(title: str, summary: str, sections: Sequence[Section], footer: str) -> str:
    """→ report.md, whose figures lie beside it."""
    parts = [f"# {escape_markdown(title)}", escape_markdown(summary)]
    for section in sections:
        parts.append(f"## {escape_markdown(section.heading)}")
        notes = [escape_markdown(note) for note in section.notes]
        parts += ["\n".join(f"- {note}" for note in notes)] if section.is_answer and notes else notes
        if section.rows:
            parts.append(markdown(section.rows))
        if section.image:
            parts.append(f"![{escape_markdown(section.alt)}]({section.file_name})")
    return "\n\n".join([*parts, escape_markdown(footer)]) + "\n"


def as_html(title: str, summary: str, sections: Sequence[Section], footer: str) -> str:
    """→ report.html, which needs no other file."""
    from jinja2 import Environment

    page = Environment(autoescape=True, trim_blocks=True).from_string(PAGE)
    return page.render(title=title, summary=summary, sections=sections, footer=footer)
