"""Scores of any causal language model of transformers on the rows of a synthetic task, by length and kind of row.

An answer counts as right where the greedy choice at each of its tokens is the right one: by induction that is what
greedy generation gives, at the price of one forward pass.
"""

import inspect
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..messages import Progress
from ..tasks.base import TEST, Task
from .loss_by_length import evaluation_mode


def evaluate_task(
    model: Any,
    task: Task,
    lengths: Sequence[int],
    num_rows: int = 100,
    tokens_per_batch: int = 8192,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of a model by length and by kind of row.

    Args:
        model: a causal language model of transformers whose tokenizer is the task's.
        task: what to test.
        lengths: of the rows, in tokens; a row takes as many of them as the task can use.
        num_rows: test rows of each length and kind; the same for every model.
        tokens_per_batch: tokens of one forward, at least one row.
        seed: of the rows.

    Returns:
        "L" → `score`, `standard_error` over the rows, `loss` (nats per token of the answers), `num_rows` and, if there
        are several kinds, `kinds`: kind → the same.

    Raises:
        ValueError: for a length that is too short for the task or that the model does not support.
    """
    found: dict[str, Any] = {}
    progress = Progress(len(lengths) * len(task.kinds) * num_rows, f"rows of {task.name}", "evaluating")
    with evaluation_mode(model), progress:
        for length in lengths:
            task.check_length("eval_lengths", length)
            by_kind = {}
            for kind in task.kinds:
                rows = [task.make_row(task.rng(seed, TEST, kind, index), length, kind) for index in range(num_rows)]
                scored = []
                size = max(1, tokens_per_batch // length)
                for first in range(0, num_rows, size):
                    scored += _score(model, task, rows[first : first + size])
                    progress.update(len(rows[first : first + size]))
                by_kind[kind] = scored
            summary = _summary([row for rows in by_kind.values() for row in rows])
            kinds = {kind: _summary(rows) for kind, rows in by_kind.items()}
            found[str(length)] = summary | ({"kinds": kinds} if len(kinds) > 1 else {})
    return found


def _score(model: Any, task: Task, rows: Sequence[tuple[list[int], list[bool]]]) -> list[tuple[float, float, int]]:
    """→ for each row its points, the points it can have and the mean loss of its answers."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, mask, answers = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for index, (tokens, is_answer) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        answers[index, : len(tokens)] = torch.tensor(is_answer)
    given = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device), "use_cache": False}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:  # none of what comes before the answers
        given["logits_to_keep"] = width - int(answers.argmax(dim=1).min()) + 1
    logits = model(**given).logits
    offset = width - logits.shape[1]
    scored = []
    for index in range(len(rows)):
        places = answers[index].nonzero()[:, 0]
        scores, targets = logits[index, places - 1 - offset].float().cpu(), ids[index, places]
        if not scores.isfinite().all():
            raise ValueError(f"the model's logits are not finite at a length of {width} tokens.")
        right = scores.argmax(-1) == targets
        points = (float(right.all()), 1.0) if task.whole_answers else (float(right.sum()), float(len(right)))
        scored.append((*points, float(torch.nn.functional.cross_entropy(scores, targets))))
    return scored


def _summary(rows: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    points, possible, losses = (np.array(column, dtype=np.float64) for column in zip(*rows))
    score = points.sum() / possible.sum()
    # rows are what is drawn: a ratio of sums over them
    spread = ((points - score * possible) ** 2).sum() * len(rows) / max(len(rows) - 1, 1)
    error = math.sqrt(spread) / possible.sum()
    return {
        "score": float(score),
        "standard_error": float(error),
        "loss": float(losses.mean()),
        "num_rows": len(rows),
    }
