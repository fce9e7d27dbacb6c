"""What is kept of windows that are read at several lengths: losses by length, position and document, and how the loss
differs between early and late places. Losses are in nats."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..results.result_file import SLIDING
from .loss_sums import ClusteredMean, DocumentLosses, RunningLoss


IN_CONTEXT_BASE = 50
IN_CONTEXT_TOKENS = (250, 500, 1000)


class WindowLosses:
    """What is kept of the losses of windows that are read in several ways.

    Attributes:
        readings: how each window is read: at evaluation lengths, the longest last, and by a sliding window before them.
    """

    def __init__(self, lengths: Sequence[int], train_length: int | None, sliding_baseline: bool) -> None:
        self.readings = [*([SLIDING] if sliding_baseline else []), *lengths]
        self.train_length = train_length
        self.targets = np.all([np.arange(lengths[-1]) % length != 0 for length in lengths], axis=0)
        self.sums = {reading: RunningLoss() for reading in self.readings}
        self.by_document, self.counts = DocumentLosses(self.readings), Counter()
        self.by_position, self.num_windows = np.zeros(lengths[-1]), 0
        self.context = _ContextStatistics(train_length)

    def add_targets(self, tokens: torch.Tensor) -> None:
        """(B, N) tokens of windows, each once, for their frequencies."""
        self.counts.update(tokens[:, self.targets].flatten().tolist())

    def add(self, reading: int | str, documents: Sequence[int], losses: np.ndarray) -> None:
        """(B, N) losses of one reading, with the number of each window's document."""
        scored = losses[:, self.targets]
        self.sums[reading].add(scored)
        for document, row in zip(documents, scored):
            self.by_document.add(document, reading, row)
        if reading == self.readings[-1]:
            self.by_position += np.nan_to_num(losses).sum(axis=0, dtype=np.float64)
            self.num_windows += len(losses)
            for document, row in zip(documents, losses):
                self.context.add(row, document)

    def summary(self) -> dict[str, Any]:
        """→ what `evaluate_lengths` returns of losses."""
        total = self.counts.total()
        by_reading = {str(reading): losses.summary() for reading, losses in self.sums.items()}
        sliding = by_reading.pop(SLIDING, None)
        found = {
            "lengths": by_reading,
            "loss_by_position": [None, *(self.by_position[1:] / self.num_windows).tolist()],
            "documents": self.by_document.summary(),
            "unigram_loss": sum(n * math.log(total / n) for n in self.counts.values()) / total,
            "num_windows": self.num_windows,
            **self.context.summary(),
        }
        if sliding:
            found[SLIDING] = {"length": self.train_length, "stride": self.train_length // 2, **sliding}
        return found


def _in_context_score(losses: np.ndarray, token: int) -> float | None:
    """Loss at `token` − loss at token 50 of one window; `None` if it is too short."""
    if token >= len(losses):
        return None

    def loss_at(position: int) -> float:
        half = min(position // 10, len(losses) - 1 - position)
        return float(losses[position - half : position + half + 1].mean())

    return loss_at(token) - loss_at(IN_CONTEXT_BASE)


def _slope_past(losses: np.ndarray, train_length: int | None) -> float | None:
    """Slope in nats per token of the line through the losses from `train_length` on; `None` for less than 3 of them."""
    if train_length is None or len(losses) - train_length < 3:
        return None
    positions = np.arange(train_length, len(losses), dtype=np.float64)
    positions -= positions.mean()
    return float((positions * losses[train_length:]).sum() / (positions**2).sum())


class _ContextStatistics:
    """How the loss differs between early and late places, over windows that are clustered by document."""

    def __init__(self, train_length: int | None) -> None:
        self.train_length, self.num_documents, self.last_document = train_length, 0, -1
        self.slope, self.scores = ClusteredMean(), {token: ClusteredMean() for token in IN_CONTEXT_TOKENS}

    def add(self, losses: np.ndarray, document: int) -> None:
        """The losses of one window; windows of a document come one after the other."""
        self.num_documents += document != self.last_document
        self.last_document = document
        means = [(mean, _in_context_score(losses, token)) for token, mean in self.scores.items()]
        for mean, value in [*means, (self.slope, _slope_past(losses, self.train_length))]:
            if value is not None:
                mean.add(value, document)

    def summary(self) -> dict[str, Any]:
        """→ in_context_score, slope, num_documents."""
        return {
            "in_context_score": {str(token): _named("score", score) for token, score in self.scores.items()},
            "slope": _named("slope", self.slope),
            "num_documents": self.num_documents,
        }


def _named(name: str, mean: ClusteredMean) -> dict[str, float | None] | None:
    estimate = mean.estimate()
    return None if estimate is None else {name: estimate[0], "standard_error": estimate[1]}
