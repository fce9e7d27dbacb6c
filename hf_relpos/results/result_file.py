"""Results: one JSON file per run; tables and plots made from such files and from nothing else."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any


REQUIRED_KEYS = ("pos_embedding_type", "seed", "train_length", "lengths", "versions", "hardware", "corpus")
# of a result on text, and of one on a synthetic task
TEXT_KEYS, TASK_KEYS = ("loss_by_position", "in_context_score", "slope"), ("task", "score_name")


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file of scripts/evaluate.py.

    Raises:
        ValueError: if the file is missing, is no JSON, or is no result.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"result file {str(path)!r} cannot be read: {error}") from error
    result_is_dict = isinstance(result, dict)
    required = REQUIRED_KEYS + (TASK_KEYS if result_is_dict and "task" in result else TEXT_KEYS)
    missing = [key for key in required if not result_is_dict or key not in result]
    if missing:
        raise ValueError(f"result file {str(path)!r} lacks {missing}.")
    number = "score" if "task" in result else "perplexity"
    try:
        whole = all(int(length) > 0 and math.isfinite(cell[number]) for length, cell in result["lengths"].items())
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole or not result["lengths"] or not isinstance(result["corpus"], dict):
        raise ValueError(f"result file {str(path)!r} has no {number} by length, or no corpus.")
    return result


def labels(results: Sequence[dict[str, Any]]) -> list[str]:
    """What to call each run in a table or a plot: scheme and seed, and the model's name where that is not enough."""
    names = [f"{result['pos_embedding_type'] or result.get('model', 'model')} ({result['seed']})" for result in results]
    return [f"{name}, {result.get('model')}" if names.count(name) > 1 else name for name, result in zip(names, results)]


def markdown_table(results: Sequence[dict[str, Any]]) -> str:
    """One row per run: perplexity by length, the ratio of the longest to the training length, score and slope; of a
    task, the scores by length and kind.

    Raises:
        ValueError: for results of different kinds together.
    """
    tasks = {result.get("task") for result in results}
    if len(tasks) > 1:
        raise ValueError(f"results of different tasks make no table: {sorted(map(str, tasks))}.")
    rows = _text_rows(results) if tasks == {None} else _task_rows(results)
    return markdown(rows)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells, the first one the head → a table, the first column to the left and the others to the right."""
    head, *body = rows
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def score_cells(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a result by condition: the length or, for a task with several kinds of rows, "512 sparse"."""
    cells = {}
    for length in sorted(result["lengths"], key=int):
        kinds = result["lengths"][length].get("kinds")
        named = {f"{length} {kind}": cell for kind, cell in kinds.items()} if kinds else None
        cells |= named or {length: result["lengths"][length]}
    return cells


def _task_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    conditions = list(dict.fromkeys(condition for result in results for condition in score_cells(result)))
    rows = [["scheme (seed)", *(f"{results[0]['score_name']} @{condition}" for condition in conditions)]]
    for name, result in zip(labels(results), results):
        cells = [score_cells(result).get(condition) for condition in conditions]
        rows.append([name, *(f"{c['score']:.3f} ± {c['standard_error']:.3f}" if c else "–" for c in cells)])
    return rows


def _text_rows(results: Sequence[dict[str, Any]]) -> list[list[str]]:
    lengths = sorted({int(length) for result in results for length in result["lengths"]})
    reference = [_ratio(result) for result in results]
    head = ["scheme (seed)", *(f"ppl@{length}" for length in lengths), "ratio", "in-context score", "slope per 1000"]
    rows = [head]
    for name, result, ratio in zip(labels(results), results, reference):
        cells = [result["lengths"].get(str(length)) for length in lengths]
        rows.append(
            [
                name,
                *(f"{cell['perplexity']:.2f}" if cell else "–" for cell in cells),
                f"{ratio:.3f}" if ratio else "–",
                _longest_score(result),
                _with_error(result["slope"], 1000),
            ]
        )
    return rows


def _ratio(result: dict[str, Any]) -> float | None:
    """Perplexity at the longest length / at the training length, if the longest is longer."""
    base, longest = result["lengths"].get(str(result["train_length"])), max(result["lengths"], key=int)
    if not base or int(longest) <= result["train_length"]:
        return None
    return result["lengths"][longest]["perplexity"] / base["perplexity"]


def _longest_score(result: dict[str, Any]) -> str:
    """The in-context score at the latest token that the windows reach, and which one that is."""
    scores = {int(token): score for token, score in result["in_context_score"].items() if score}
    return f"{_with_error(scores[max(scores)], 1)} @{max(scores)}" if scores else "–"


def _with_error(estimate: dict[str, float] | None, factor: float) -> str:
    if not estimate:
        return "–"
    value, error = estimate.get("score", estimate.get("slope")), estimate["standard_error"]
    return f"{factor * value:+.3f}" + ("" if error is None else f" ± {factor * error:.3f}")


def plot_results(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws loss by position and perplexity by length, one line per run.

    Returns:
        the paths of `loss_by_position.png` and `perplexity_by_length.png` in `folder`.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "loss_by_position.png", folder / "perplexity_by_length.png"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in zip(labels(results), results):
        positions, losses = smooth_by_position(result["loss_by_position"])
        axes.plot(positions, losses, label=name)
    axes.set(xscale="log", xlabel="position (tokens of context)", ylabel="loss (nats per token)")
    octaves = range(max(len(result["loss_by_position"]) for result in results).bit_length())
    _label_ticks(axes, [2**octave for octave in octaves])
    _finish(figure, axes, results, paths[0])

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in zip(labels(results), results):
        lengths = sorted(int(length) for length in result["lengths"])
        perplexities = [result["lengths"][str(length)]["perplexity"] for length in lengths]
        axes.plot(lengths, perplexities, marker="o", label=name)
    axes.set(xscale="log", xlabel="evaluation length (tokens)", ylabel="perplexity, same target tokens")
    _label_ticks(axes, sorted({int(length) for result in results for length in result["lengths"]}))
    low, high = axes.get_ylim()
    if high > 3 * low:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter("{x:.0f}")
        axes.yaxis.set_major_formatter("{x:.0f}")
    elif high < 1.05 * low:  # a flat line is to look flat
        axes.set_ylim(0.975 * low, 1.025 * high)
    _finish(figure, axes, results, paths[1])
    return paths


def plot_scores(results: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """Draws the scores of a task by length, one line per run and kind of row; → the path of `score_by_length.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, result in zip(labels(results), results):
        lines: dict[str, dict[int, float]] = {}
        for condition, cell in score_cells(result).items():
            length, _, kind = condition.partition(" ")
            lines.setdefault(f"{name} {kind}".strip(), {})[int(length)] = cell["score"]
        for label, points in lines.items():
            axes.plot(list(points), list(points.values()), marker="o", label=label)
    axes.set(xscale="log", ylim=(-0.03, 1.03), xlabel="length (tokens)", ylabel=results[0]["score_name"])
    _label_ticks(axes, sorted({int(length) for result in results for length in result["lengths"]}))
    path = folder / "score_by_length.png"
    _finish(figure, axes, results, path)
    return [path]


def smooth_by_position(losses: Sequence[float | None], bins_per_octave: int = 4) -> tuple[list[float], list[float]]:
    """Mean loss in bins of equal width on a log axis: single positions are too noisy to look at.

    Args:
        losses: loss by position; `None` where nothing was predicted.
        bins_per_octave: bins for each doubling of the position.

    Returns:
        the bins' mean positions and mean losses.
    """
    bins: dict[int, list[tuple[int, float]]] = {}
    for position, loss in enumerate(losses):
        if position and loss is not None:
            bins.setdefault(round(math.log2(position) * bins_per_octave), []).append((position, loss))
    means = [tuple(sum(column) / len(pairs) for column in zip(*pairs)) for pairs in bins.values()]
    return [position for position, _ in means], [loss for _, loss in means]


def _label_ticks(axes: Any, ticks: Sequence[int]) -> None:
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)


def _finish(figure: Any, axes: Any, results: Sequence[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot

    for length in sorted({result["train_length"] for result in results if result["train_length"]}):
        axes.axvline(length, color="grey", linestyle=":", linewidth=1)
        axes.text(length, 0.98, " trained length", transform=axes.get_xaxis_transform(), va="top", color="grey")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
