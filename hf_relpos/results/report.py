"""The report of an experiment: tables, words and figures over seeds, as Markdown and as one HTML file."""

import base64
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..cli import command, parse_arguments
from ..environment import write_bytes, write_text
from .plots import plot_results, plot_scores
from .report_figures import draw_figures
from .result_file import (
    RESULTS,
    corpus_note,
    escape_markdown,
    markdown,
    markdown_table,
    read_readable,
    read_results,
    text_title,
)
from .statistics import Comparison, Group, Interval, compare, group_results, run_labels, verdict


VERDICTS = "Which differences are significant"
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.82rem; display: block; overflow-x: auto }
th, td { border-bottom: 1px solid #ddd; padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap }
th:first-child, td:first-child { text-align: left }
img { max-width: 100% }
li.significant { font-weight: 600 }
td small { color: #666 }
footer { color: #666; font-size: 0.85rem }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ summary }}</p>
{% for heading, note, rows in tables %}
<h2>{{ heading }}</h2>
<p>{{ note }}</p>
<table>
<thead><tr>{% for cell in rows[0] %}<th>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in rows[1:] %}<tr>{% for cell in row %}{% set value, bracket, interval = cell.partition(" (") %}
<td>{{ value }}{% if bracket %}<br><small>({{ interval }}</small>{% endif %}</td>{% endfor %}</tr>{% endfor %}</tbody>
</table>
{% endfor %}
<h2>{{ verdicts_heading }}</h2>
<ul>{% for significant, sentence in verdicts %}
<li{% if significant %} class="significant"{% endif %}>{{ sentence }}</li>{% endfor %}</ul>
{% for heading, image in figures %}
<h2>{{ heading }}</h2>
<img alt="{{ heading }}" src="data:image/png;base64,{{ image }}">
{% endfor %}
<footer><p>{{ footer }}</p></footer>
</body>
</html>
"""


def write_report(
    results: Sequence[dict[str, Any]],
    folder: Path,
    baseline: str | None = None,
    title: str = "Position schemes",
    varied: Sequence[str] = (),
) -> list[Path]:
    """Writes report.md with its figures, and report.html, which holds all in one file.

    Args:
        results: of scripts/evaluate.py, any number of seeds of each setting.
        folder: where to write.
        baseline: label of the group that all others are compared to; the first one by default.
        title: heading of the page.
        varied: fields of the recipe that the experiment varies, such as "recipe.learning_rate".

    Returns:
        the paths.

    Raises:
        ValueError: if the results cannot be compared, or if there is no such baseline.
    """
    groups = group_results(results, varied)
    baseline = baseline or groups[0].label
    comparisons = compare(groups, baseline)
    content = {
        "title": title,
        "summary": f"{_summary(groups, comparisons, baseline)} {corpus_note(results, run_labels(results, varied))}",
        "tables": [
            (heading, f"{text_title(results)}. {note}", rows)
            for heading, note, rows in _tables(groups, comparisons, baseline)
        ],
        "verdicts": [(comparison.significant, verdict(comparison, baseline)) for comparison in comparisons],
        "figures": draw_figures(groups),
        "footer": _footer(results),
    }
    paths = [folder / "report.md", folder / "report.html"]
    write_text(paths[0], _as_markdown(content))
    write_text(paths[1], _as_html(content))
    for heading, image in content["figures"]:
        paths.append(folder / _file_name(heading))
        write_bytes(paths[-1], image)
    return paths


def _file_name(heading: str) -> str:
    return f"{heading.lower().replace(' ', '_')}.png"


def _as_markdown(content: dict[str, Any]) -> str:
    escape = escape_markdown
    parts = [f"# {escape(content['title'])}", escape(content["summary"])]
    for heading, note, rows in content["tables"]:
        parts += [f"## {escape(heading)}", escape(note), markdown(rows)]
    sentences = "\n".join(f"- {escape(sentence)}" for _, sentence in content["verdicts"])
    parts += [f"## {VERDICTS}", sentences or "One group: no comparison."]
    for heading, _ in content["figures"]:
        parts += [f"## {heading}", f"![{heading}]({_file_name(heading)})"]
    return "\n\n".join([*parts, escape(content["footer"])]) + "\n"


def _as_html(content: dict[str, Any]) -> str:
    from jinja2 import Environment

    verdicts = [(significant, sentence.replace("**", "")) for significant, sentence in content["verdicts"]]
    figures = [(heading, base64.b64encode(image).decode()) for heading, image in content["figures"]]
    page = Environment(autoescape=True).from_string(PAGE)
    return page.render(**content | {"verdicts": verdicts, "figures": figures, "verdicts_heading": VERDICTS})


def _summary(groups: Sequence[Group], comparisons: Sequence[Comparison], baseline: str) -> str:
    seeds = sorted({len(group.by_seed) for group in groups})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    significant = sum(comparison.significant for comparison in comparisons)
    text = f"{len(groups)} settings, {count} seeds each, {sum(len(group.by_seed) for group in groups)} runs."
    if comparisons:
        text += f" Of {len(comparisons)} differences to {baseline}, {significant} are significant at 5 %."
    if seeds[0] < 3:
        text += " With fewer than three seeds, hardly any difference can be."
    return text


def _footer(results: Sequence[dict[str, Any]]) -> str:
    first = results[0]
    machines = sorted({result["hardware"].get("gpu", result["hardware"]["cpu"]) for result in results})
    seconds = sum((result["training"] or {}).get("seconds", 0) for result in results)
    corpus = first["corpus"]
    return (
        f"Corpus {corpus['name']} ({corpus['split']}, {corpus['num_windows']} windows), trained on "
        f"{', '.join(machines)} in {seconds / 3600:.1f} hours."
    )


# --- tables: rows of cells, the first one the head


def _tables(
    groups: Sequence[Group], comparisons: Sequence[Comparison], baseline: str
) -> list[tuple[str, str, list[list[str]]]]:
    """→ heading, note and rows of all tables that have rows."""
    tables = _score_tables(groups) if groups[0].score_name else _text_tables(groups)
    unit = groups[0].score_name or "Loss in nats per token"
    note = (
        f"{unit}, paired by seed, with its 95 % interval; p by Student's paired test, corrected for all "
        f"{len(comparisons)} comparisons (Holm)."
    )
    tables.append((f"Difference to {baseline}", note, _comparison_rows(comparisons)))
    return [table for table in tables if len(table[2]) > 1]


def _text_tables(groups: Sequence[Group]) -> list[tuple[str, str, list[list[str]]]]:
    """→ heading, note and rows of the tables of losses."""
    rows = _condition_rows(groups, "perplexity", 2)
    for row, group in zip(rows[1:], groups):
        row.append(_cell(group.ratio(), 3))
    rows[0].append("ratio")
    return [
        (
            "Perplexity by length",
            "Mean ± standard deviation over the seeds, and the 95 % interval of the mean; all lengths are scored on "
            "the same tokens. Ratio: perplexity at the longest length / at the training length.",
            rows,
        ),
        (
            "Use of the context",
            "In-context score: loss at a late token − loss at token 50, in nats; slope: nats per 1000 tokens past the "
            "training length. Below 0 more context helps.",
            _context_rows(groups),
        ),
    ]


def _score_tables(groups: Sequence[Group]) -> list[tuple[str, str, list[list[str]]]]:
    """→ heading, note and rows of the table of a task's scores."""
    name, task = groups[0].score_name, groups[0].first["task"]
    note = f"Task {task}: {name}, by the length of the rows in tokens and their kind. Mean ± standard deviation over "
    note += "the seeds, and the 95 % interval of the mean, which ignores the limits 0 and 1."
    return [("Score by length", note, _condition_rows(groups, "score", 3))]


def _condition_rows(groups: Sequence[Group], key: str, digits: int) -> list[list[str]]:
    conditions = list(dict.fromkeys(condition for group in groups for condition in group.conditions()))
    conditions.sort(key=lambda condition: int(condition.partition(" ")[0]))
    rows = [["setting", "seeds", *conditions]]
    for group in groups:
        cells = [
            _cell(Interval.of(list(group.values(condition, key).values())), digits)
            if condition in group.conditions()
            else "–"
            for condition in conditions
        ]
        rows.append([group.label, str(len(group.by_seed)), *cells])
    return rows


def _context_rows(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["setting", "in-context score", "slope per 1000"]]
    for group in groups:
        score = group.in_context_score()
        cell = "–" if score is None else f"{_cell(score[1], 3)} @{score[0]}"
        rows.append([group.label, cell, _cell(group.slope(), 3, 1000)])
    return rows if any(cell != "–" for row in rows[1:] for cell in row[1:]) else rows[:1]


def _comparison_rows(comparisons: Sequence[Comparison]) -> list[list[str]]:
    rows = [["setting", "tokens", "seeds", "difference", "95 % interval", "p", "corrected p"]]
    for each in comparisons:
        rows.append(
            [
                each.label,
                each.condition,
                str(each.difference.n),
                f"{each.difference.mean:+.4f}",
                "–" if each.difference.n < 2 else f"{each.difference.low:+.4f} to {each.difference.high:+.4f}",
                "–" if math.isnan(each.p_value) else f"{each.p_value:.2g}",
                "–" if math.isnan(each.corrected) else f"{each.corrected:.2g}",
            ]
        )
    return rows


def _cell(interval: Interval | None, digits: int = 2, factor: float = 1) -> str:
    if interval is None:
        return "–"
    mean, std, low, high = (factor * x for x in (interval.mean, interval.std, interval.low, interval.high))
    if interval.n == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {std:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"


# --- the command


DESCRIPTION = """\
Makes tables and plots of several result files of evaluate.py; of a sweep, statistics over the seeds.

hf-relpos report --results output/*/results.json --output_dir output/report
hf-relpos report --sweep output/relative --output_dir output/report
"""


@dataclass
class ReportArguments:
    """Which results, and where the report goes."""

    output_dir: str = field(metadata={"help": "Folder for the tables and the plots."})
    results: list[str] = field(
        default_factory=list, metadata={"help": "Result files, .json or .jsonl: a row for each run."}
    )
    sweep: str | None = field(
        default=None,
        metadata={"help": "Output folder of sweep.py: statistics over the seeds, as report.html and report.md."},
    )
    baseline: str | None = field(
        default=None, metadata={"help": "Setting that the others of a sweep are compared to; the first by default."}
    )
    varied: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Fields of the recipe that a sweep varies, such as recipe.learning_rate, or training.corpus; "
            "others must agree."
        },
    )
    title: str = field(default="Position schemes", metadata={"help": "Heading of the page of a sweep."})


@command
def main() -> None:
    (args,) = parse_arguments((ReportArguments,), DESCRIPTION)
    folder = Path(args.output_dir)
    if bool(args.results) == bool(args.sweep):
        raise ValueError("either --results or --sweep is required.")
    if args.sweep:
        results = read_results(_results_of_sweep(Path(args.sweep)))
        names = run_labels(results, args.varied)
        paths = write_report(results, folder, args.baseline, args.title, args.varied)
    else:
        results, errors = read_readable(args.results)
        if not results:
            raise ValueError("no result can be read: " + "; ".join(errors))
        for error in errors:
            print(f"left out: {error}", file=sys.stderr)
        names = run_labels(results, args.varied)
        table = markdown_table(results, names)
        write_text(folder / "table.md", f"{table}\n\n{escape_markdown(corpus_note(results, names))}\n")
        print(table)
        paths = [folder / "table.md", *(plot_scores if "task" in results[0] else plot_results)(results, folder, names)]
    print("\n".join([*(f"wrote {path}" for path in paths), corpus_note(results, names)]))


def _results_of_sweep(folder: Path) -> Path:
    if not (folder / RESULTS).is_file():
        raise ValueError(f"`sweep` {str(folder)!r} holds no finished sweep: there is no {RESULTS}.")
    return folder / RESULTS
