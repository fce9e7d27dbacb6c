"""Results: a JSON file of one run, or a file of JSON lines with the runs of an experiment; and tables of them."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..environment import write_text
from ..file_reading import parse_json, read_text_file
from .schema import check_schema


# the runs of an experiment, in the folder of scripts/sweep.py and in those of docs/results
RESULTS = "results.jsonl"
SLIDING = "sliding_baseline"  # of a result: the same tokens by a sliding window of the training length
REQUIRED_KEYS = ("pos_embedding_type", "seed", "train_length", "lengths", "versions", "hardware", "corpus")
# of a result on text, and of one on a synthetic task
TEXT_KEYS, TASK_KEYS = ("loss_by_position", "in_context_score", "slope"), ("task", "score_name")
MAX_DOCUMENT_GROUPS = 256  # of more documents, neighbours are put together
# what stands beside these two numbers wherever they are shown
CONTEXT_NOTE = (
    "The in-context score (loss at the named token − loss at token 50, in nats) and the slope (of the loss past the "
    "training length, in nats per 1000 tokens) compare different places of the text, which are not equally hard: by "
    "themselves they do not say whether more context helps. Compare settings on the same text."
)
# significant digits that `write_results` keeps: of long curves, which are only drawn, and of all other numbers
CURVE_DIGITS, DIGITS = {"loss_by_position": 5, "distance_bias": 4, "log": 5, "documents": 6}, 8


def read_result(path: str | Path) -> dict[str, Any]:
    """The result file that scripts/evaluate.py wrote for one run.

    Raises:
        ValueError: if the file is missing, is not JSON, holds NaN, or is not a result.
    """
    return _parse(_read(path), f"result file {str(path)!r}")


def read_results(path: str | Path) -> list[dict[str, Any]]:
    """The runs of a result file: one of a `.json` file, or one per line of a `.jsonl` file.

    Raises:
        ValueError: if the file is missing or empty; if a line is not a result, or repeats an earlier one, with its
            number.
    """
    if Path(path).suffix != ".jsonl":
        return [read_result(path)]
    results: list[dict[str, Any]] = []
    first_line: dict[str, int] = {}
    text = _read(path)
    # text may hold other ends of lines, such as U+2029 as the separator of documents
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        result = _parse(line, f"result file {str(path)!r}, line {number}")
        repeated = first_line.setdefault(json.dumps(result, sort_keys=True), number)
        if repeated != number:
            raise ValueError(f"result file {str(path)!r}, line {number} repeats line {repeated}.")
        results.append(result)
    if not results:
        raise ValueError(f"result file {str(path)!r} holds no results.")
    return results


def read_readable(paths: Iterable[str | Path]) -> tuple[list[dict[str, Any]], list[str]]:
    """→ the runs of all result files that can be read, and what is wrong with each of the others.

    A copy of a result, such as one in the folder of a dry run of a push, counts once.
    """
    results, errors, places = [], [], {}
    for path in paths:
        try:
            for result in read_results(path):
                first = places.setdefault(json.dumps(result, sort_keys=True), path)
                if first is path:
                    results.append(result)
                else:
                    errors.append(f"result file {str(path)!r} repeats {str(first)!r}")
        except ValueError as error:
            errors.append(str(error))
    return results, errors


def best_result(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The one with the lowest loss at its longest length."""
    return min(results, key=lambda result: result["lengths"][max(result["lengths"], key=int)]["loss"])


def write_results(path: Path, results: Iterable[dict[str, Any]]) -> None:
    """Writes one run per line, whole or not at all, as small as tables and plots allow.

    Numbers are rounded, and `loss_by_position` is kept as it is drawn: `{"positions": .., "losses": ..}`, means of a
    quarter of an octave each. The loss at every single position remains in the results.json of the run.
    """
    lines = (json.dumps(_compact(r), ensure_ascii=False, allow_nan=False, separators=(",", ":")) for r in results)
    write_text(path, "".join(f"{line}\n" for line in lines))


def _compact(result: dict[str, Any]) -> dict[str, Any]:
    if result.get("loss_by_position"):
        positions, losses = smooth_by_position(result["loss_by_position"])
        result = {**result, "loss_by_position": {"positions": positions, "losses": losses}}
    return rounded(result)


def rounded(value: Any, digits: int = DIGITS) -> Any:
    """→ the value with its numbers, in lists and dictionaries too, as they are stored."""
    if isinstance(value, dict):
        return {key: rounded(each, CURVE_DIGITS.get(key, digits)) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each, digits) for each in value]
    if isinstance(value, float) and math.isfinite(value):
        number = float(f"{value:.{digits}g}")
        # "3" is shorter than "3.0"; in a curve the two are the same
        return int(number) if digits < DIGITS and number.is_integer() else number
    return value


def _read(path: str | Path) -> str:
    return read_text_file(path, "result file")


def _parse(text: str, where: str) -> dict[str, Any]:
    """→ the result that a text holds; an error begins with `where`."""
    result = parse_json(text, where)
    is_dict = isinstance(result, dict)
    required = REQUIRED_KEYS + (TASK_KEYS if is_dict and "task" in result else TEXT_KEYS)
    missing = [key for key in required if not is_dict or key not in result]
    if missing:
        raise ValueError(f"{where} lacks {missing}.")
    check_schema(result, "TASK_RESULT" if "task" in result else "TEXT_RESULT", where)
    return result


def labels(results: Sequence[dict[str, Any]]) -> list[str]:
    """What to call each run in a table or a plot: scheme and seed, the model's name where that is not enough, and
    whether it was trained on another text."""
    names = [f"{result['pos_embedding_type'] or result.get('model', 'model')} ({result['seed']})" for result in results]
    return [
        (f"{name}, {result.get('model')}" if names.count(name) > 1 else name) + other_corpus_mark(result)
        for name, result in zip(names, results)
    ]


def other_corpus_mark(result: dict[str, Any]) -> str:
    """→ what stands behind the name of a run on text that is no split of what it was trained on; else nothing."""
    return ", on another text" if result["corpus"].get("same_corpus_as_training") is False else ""


def has_held_out_ends(result: dict[str, Any]) -> bool:
    """Whether the text of a result is the end of documents whose beginnings were trained on."""
    return bool((result["corpus"].get("read") or {}).get("num_ends"))


def split_name(result: dict[str, Any]) -> str:
    """→ the text of a result: corpus and split."""
    return f"{result['corpus'].get('name')}, split {result['corpus'].get('split')}"


def text_title(results: Sequence[dict[str, Any]]) -> str:
    """→ the text of results for a heading, marked if it is another one than all of them were trained on."""
    marks = {other_corpus_mark(result) for result in results}
    return split_name(results[0]) + (" (not what was trained on)" if "" not in marks else "")


def corpus_note(results: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> str:
    """A sentence or two for results on one text: which it is, and which models were trained on another.

    Args:
        results: any number of runs.
        names: what to call each; by default `labels`.
    """
    lines, own = [f"Text: {split_name(results[0])}."], []
    others: dict[str | None, list[str]] = {}
    for result, name in zip(results, names or labels(results)):
        mark = other_corpus_mark(result)
        (others.setdefault(result["corpus"].get("trained_on"), []) if mark else own).append(name.removesuffix(mark))
    for corpus, names in others.items():
        whose = ", ".join(dict.fromkeys(names)) if own or len(others) > 1 or len(names) == 1 else "the models"
        if corpus is None:
            lines.append(f"What {whose} trained on is not recorded.")
        else:
            lines.append(f"It is no split of the corpus that {whose} trained on, {corpus}.")
    return " ".join(lines)


def markdown_table(results: Sequence[dict[str, Any]], names: Sequence[str] | None = None) -> str:
    """One row per run: perplexity by length, the ratio of the longest to the training length, score and slope; of a
    task, the scores by length and kind.

    Args:
        results: any number of runs.
        names: what to call each; by default `labels`.

    Raises:
        ValueError: for results of different kinds together.
    """
    tasks = {result.get("task") for result in results}
    if len(tasks) > 1:
        raise ValueError(f"results of different tasks make no table: {sorted(map(str, tasks))}.")
    rows = (_text_rows if tasks == {None} else _task_rows)(results, names or labels(results))
    return markdown(rows)


def context_notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """→ `CONTEXT_NOTE` where `markdown_table` shows a score or a slope, else nothing."""
    is_shown = any(result.get("slope") or any((result.get("in_context_score") or {}).values()) for result in results)
    return [CONTEXT_NOTE] if is_shown and not any("task" in result for result in results) else []


def ratio_notes(results: Sequence[dict[str, Any]]) -> list[str]:
    """→ why `markdown_table` shows no ratio for a result on text, where that is so."""
    missing = [result for result in results if "task" not in result and _ratio(result) is None]
    notes = {
        "ratio –: it is the perplexity at the longest length by that at the training length, which is "
        + (
            f"{length}: --eval_lengths of `hf-relpos evaluate` must hold it and a longer one."
            if length
            else "not known (--train_length of `hf-relpos evaluate`)."
        )
        for length in (result["train_length"] for result in missing)
    }
    return sorted(notes)


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of plain text, the first one the head → a table, the first column to the left, the others to the right."""
    head, *body = [[escape_markdown(cell) for cell in row] for row in rows]
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def escape_markdown(text: Any) -> str:
    """Text that may hold names of anybody → Markdown that shows it as it is, in one line and in a table too."""
    escaped = re.sub(r"([\\`|$\[\]])", r"\\\1", " ".join(str(text).split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def score_cells(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The cells of a result by condition: the length or, for a task with several kinds of rows, "512 sparse"."""
    cells = {}
    for length in sorted(result["lengths"], key=int):
        kinds = result["lengths"][length].get("kinds")
        named = {f"{length} {kind}": cell for kind, cell in kinds.items()} if kinds else None
        cells |= named or {length: result["lengths"][length]}
    return cells


def _task_rows(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[list[str]]:
    conditions = list(dict.fromkeys(condition for result in results for condition in score_cells(result)))
    rows = [["scheme (seed)", *(f"{results[0]['score_name']} @{condition}" for condition in conditions)]]
    for name, result in zip(names, results):
        cells = [score_cells(result).get(condition) for condition in conditions]
        rows.append([name, *(f"{c['score']:.3f} ± {c['standard_error']:.3f}" if c else "–" for c in cells)])
    return rows


def _text_rows(results: Sequence[dict[str, Any]], names: Sequence[str]) -> list[list[str]]:
    lengths = sorted({int(length) for result in results for length in result["lengths"]})
    reference = [_ratio(result) for result in results]
    head = ["scheme (seed)", *(f"ppl@{length}" for length in lengths), "ratio", "in-context score", "slope per 1000"]
    rows = [head]
    for name, result, ratio in zip(names, results, reference):
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


def smooth_by_position(
    losses: Sequence[float | None] | dict[str, list[float]], bins_per_octave: int = 4
) -> tuple[list[float], list[float]]:
    """Mean loss in bins of equal width on a log axis: single positions are too noisy to look at.

    Args:
        losses: loss by position, `None` where nothing was predicted; or the bins as `write_results` stores them.
        bins_per_octave: bins for each doubling of the position.

    Returns:
        the bins' mean positions and mean losses.
    """
    if isinstance(losses, dict):
        return losses["positions"], losses["losses"]
    bins: dict[int, list[tuple[int, float]]] = {}
    for position, loss in enumerate(losses):
        if position and loss is not None:
            bins.setdefault(round(math.log2(position) * bins_per_octave), []).append((position, loss))
    means = [tuple(sum(column) / len(pairs) for column in zip(*pairs)) for pairs in bins.values()]
    return [position for position, _ in means], [loss for _, loss in means]
