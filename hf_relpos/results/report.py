"""The report of an experiment: tables, words and figures over seeds, as Markdown and as one HTML file."""

import base64
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment

from ..environment import write_text
from .result_file import markdown, smooth_by_position
from .statistics import Comparison, Group, Interval, compare, group_results, verdict


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
li.real { font-weight: 600 }
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
<h2>What is real</h2>
<ul>{% for real, sentence in verdicts %}<li{% if real %} class="real"{% endif %}>{{ sentence }}</li>{% endfor %}</ul>
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
    tables = _score_tables(groups) if groups[0].score_name else _text_tables(groups)
    unit = groups[0].score_name or "Loss in nats per token"
    tables.append(
        (
            f"Difference to {baseline}",
            f"{unit}, paired by seed, with its 95 % interval; p by Student's paired test, corrected for all "
            f"{len(comparisons)} comparisons (Holm).",
            _comparison_rows(comparisons),
        )
    )
    tables = [table for table in tables if len(table[2]) > 1]
    drawn = [(heading, _png(draw, groups)) for heading, applies, draw in FIGURES if applies(groups)]
    sentences = [(comparison.is_real, verdict(comparison, baseline)) for comparison in comparisons]
    summary = _summary(groups, comparisons, baseline)
    paths = [folder / "report.md", folder / "report.html"]
    lines = [f"# {title}", summary]
    for heading, note, rows in tables:
        lines += [f"## {heading}", note, markdown(rows)]
    lines += ["## What is real", "\n".join(f"- {sentence}" for _, sentence in sentences) or "One group: no comparison."]
    folder.mkdir(parents=True, exist_ok=True)
    for heading, image in drawn:
        paths.append(folder / f"{heading.lower().replace(' ', '_')}.png")
        paths[-1].write_bytes(image)
        lines += [f"## {heading}", f"![{heading}]({paths[-1].name})"]
    lines.append(_footer(results))
    write_text(paths[0], "\n\n".join(lines) + "\n")
    page = Environment(autoescape=True).from_string(PAGE)
    content = page.render(
        title=title,
        summary=summary,
        tables=tables,
        verdicts=[(real, sentence.replace("**", "")) for real, sentence in sentences],
        figures=[(heading, base64.b64encode(image).decode()) for heading, image in drawn],
        footer=_footer(results),
    )
    write_text(paths[1], content)
    return paths


def _summary(groups: Sequence[Group], comparisons: Sequence[Comparison], baseline: str) -> str:
    seeds = sorted({len(group.by_seed) for group in groups})
    count = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    real = sum(comparison.is_real for comparison in comparisons)
    text = f"{len(groups)} settings, {count} seeds each, {sum(len(group.by_seed) for group in groups)} runs."
    if comparisons:
        text += f" Of {len(comparisons)} differences to {baseline}, {real} stand out of the noise of the seeds."
    if seeds[0] < 3:
        text += " With fewer than three seeds hardly any difference can."
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
    note += "the seeds, and the 95 % interval of the mean, which takes no notice of the limits 0 and 1."
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


# --- figures


MANY = 10  # groups, from which on a figure is larger and its legend beside it


def _png(draw: Callable[[Any, Sequence[Group]], None], groups: Sequence[Group]) -> bytes:
    import matplotlib
    from cycler import cycler

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = pyplot.figure(figsize=(13, 8) if len(groups) > MANY else (9, 5), layout="constrained")
    # no two lines alike
    styles = cycler(linestyle=["-", "--", ":", "-."]) * pyplot.rcParamsDefault["axes.prop_cycle"]
    with pyplot.rc_context({"axes.prop_cycle": styles}):
        draw(figure, groups)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
    return stream.getvalue()


def _band(axes: Any, xs: Sequence[float], rows: Sequence[Sequence[float]], label: str, **style: Any) -> None:
    """The mean of (seeds, points) values, with the range of the seeds as a band."""
    values = np.asarray(rows, dtype=np.float64)
    (line,) = axes.plot(xs, values.mean(axis=0), label=label, **style)
    axes.fill_between(xs, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def _finish(axes: Any, groups: Sequence[Group], marks: bool = True, **labels: str) -> None:
    axes.set(**labels)
    for length in sorted({group.train_length for group in groups if marks and group.train_length}):
        axes.axvline(length, color="grey", linestyle=":", linewidth=1)
    axes.grid(alpha=0.3)
    if len(groups) > MANY:
        for band in axes.collections:
            band.set_alpha(0.06)
        # in the order in which the lines end
        lines = sorted(axes.get_legend_handles_labels()[0], key=lambda line: -line.get_ydata()[-1])
        axes.legend(handles=lines, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    else:
        axes.legend(fontsize="small", ncols=2 if len(groups) > 8 else 1)


def _loss_by_position(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        curves = [smooth_by_position(result["loss_by_position"]) for result in group.by_seed.values()]
        _band(axes, curves[0][0], [losses for _, losses in curves], group.label)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    labels = {"xlabel": "tokens of context", "ylabel": "loss (nats per token), band: range of the seeds"}
    _finish(axes, groups, **labels)


def _perplexity_by_length(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        lengths = group.lengths()
        rows = np.array([list(group.values(str(length), "perplexity").values()) for length in lengths]).T
        _band(axes, lengths, rows, group.label, marker="o", markersize=4)
    lengths = sorted({length for group in groups for length in group.lengths()})
    axes.set(xscale="log", yscale="log")
    axes.set_xticks(lengths, [str(length) for length in lengths])
    axes.set_xticks([], minor=True)
    for formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        formatter("{x:.4g}")
    _finish(axes, groups, xlabel="evaluation length (tokens)", ylabel="perplexity, band: range of the seeds")


def _score_by_length(figure: Any, groups: Sequence[Group]) -> None:
    """A panel for each kind of row."""
    kinds = list(dict.fromkeys(condition.partition(" ")[2] for condition in groups[0].conditions()))
    columns = min(3, len(kinds))
    figure.set_size_inches(9, 0.8 + 4.2 * math.ceil(len(kinds) / columns) / (1 if columns == 1 else 1.4))
    panels = figure.subplots(math.ceil(len(kinds) / columns), columns, squeeze=False, sharex=True, sharey=True).flat
    for kind, axes in zip(kinds, panels):  # in this order: the panels that are left stay in the iterator
        for group in groups:
            names = {length: f"{length} {kind}".strip() for length in group.lengths()}
            rows = np.array([list(group.values(name, "score").values()) for name in names.values()]).T
            _band(axes, list(names), rows, group.label, marker="o", markersize=4)
        lengths = sorted({length for group in groups for length in group.lengths()})
        axes.set(xscale="log", title=kind, ylim=(-0.03, 1.03))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.set_xticks([], minor=True)
        _finish(axes, groups, xlabel="length (tokens)", ylabel=f"{groups[0].score_name}, band: range of the seeds")
        if axes is not figure.axes[0]:
            axes.legend().remove()
            axes.set_ylabel("")
    for axes in list(panels):
        axes.set_axis_off()


def _training_curves(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    for group in groups:
        logs = [_log(result) for result in group.by_seed.values()]
        steps = sorted(set.intersection(*(set(log) for log in logs)))
        _band(axes, steps, [[log[step] for step in steps] for log in logs], group.label)
    _finish(axes, groups, marks=False, xlabel="step", ylabel="training loss (nats per token)")


def _log(result: dict[str, Any]) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in result["training"].get("log", []) if "loss" in entry}


def _finetune_curves(figure: Any, groups: Sequence[Group]) -> None:
    axes = figure.subplots()
    curves: dict[str, dict[int, list[float]]] = {}
    for group in _finetuned(groups):
        first = group.first
        name = f"{first['pos_embedding_type']} {first['training']['base_train_length']} → {first['train_length']}"
        losses = list(group.values(str(group.lengths()[-1]), "loss").values())
        curves.setdefault(name, {})[first["training"]["num_steps"]] = losses
    for name, points in curves.items():
        steps = sorted(points)
        _band(axes, steps, np.array([points[step] for step in steps]).T, name, marker="o", markersize=4)
    length = groups[0].lengths()[-1]
    axes.set_xscale("log")
    _finish(axes, groups, marks=False, xlabel="finetuning steps", ylabel=f"loss at {length} (nats per token)")


def _finetuned(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.first["training"].get("base_train_length")]


def _learned_biases(figure: Any, groups: Sequence[Group]) -> None:
    """One panel for each scheme with a bias, of its first seed: a line for each layer and head."""
    from matplotlib import colormaps

    shown = [group for group in groups if _curves(group)]
    columns = min(3, len(shown))
    figure.set_size_inches(9, 3.2 * math.ceil(len(shown) / columns))
    panels = figure.subplots(math.ceil(len(shown) / columns), columns, squeeze=False, sharex=True).flat
    for group, axes in zip(shown, panels):  # in this order: the panels that are left stay in the iterator
        curves = _curves(group)
        for layer, heads in enumerate(curves["layers"]):
            color = colormaps["viridis"](layer / max(1, len(curves["layers"]) - 1))
            for head, values in enumerate(heads):
                xs = [distance + 1 for distance in curves["distances"]]
                axes.plot(xs, values, color=color, linewidth=0.9, label=f"layer {layer}" if head == 0 else None)
        axes.set(xscale="log", title=f"{group.label}, seed {next(iter(group.by_seed))}", xlabel="distance + 1 (tokens)")
        if np.ptp(curves["layers"]) > 100:  # what is near would not show beside what is far
            axes.set_yscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
    for axes in list(panels):
        axes.set_axis_off()
    figure.axes[0].set_ylabel("bias (added to the scores)")
    figure.axes[0].legend(fontsize="x-small")


def _curves(group: Group) -> dict[str, Any] | None:
    return group.first.get("distance_bias")


# heading, whether it applies, what draws it
FIGURES: tuple[tuple[str, Callable[[Sequence[Group]], Any], Callable[[Any, Sequence[Group]], None]], ...] = (
    ("Loss by position", lambda groups: not groups[0].score_name, _loss_by_position),
    (
        "Perplexity by length",
        lambda groups: not groups[0].score_name and len(groups[0].lengths()) > 1,
        _perplexity_by_length,
    ),
    ("Score by length", lambda groups: groups[0].score_name, _score_by_length),
    ("Loss after finetuning", _finetuned, _finetune_curves),
    ("Training loss", lambda groups: all(map(_log, groups[0].by_seed.values())), _training_curves),
    ("Bias by distance", lambda groups: any(map(_curves, groups)), _learned_biases),
)
