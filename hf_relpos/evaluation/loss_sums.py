"""Sums of losses that come in pieces: of all tokens, of clusters of windows, and of documents. Losses are in nats."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..results.result_file import MAX_DOCUMENT_GROUPS


class RunningLoss:
    """Mean and median of losses that come in pieces, in constant memory; the median to 0.001 nats, by a histogram."""

    bins_per_nat = 1024
    max_loss = 64

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0
        self.histogram = np.zeros(self.bins_per_nat * self.max_loss, dtype=np.int64)

    def add(self, losses: np.ndarray) -> None:
        """Adds losses of any shape; NaN entries are skipped."""
        losses = losses[~np.isnan(losses)]
        self.total += float(losses.sum(dtype=np.float64))
        self.count += losses.size
        bins = np.minimum(losses * self.bins_per_nat, len(self.histogram) - 1).astype(np.int64)
        self.histogram += np.bincount(bins, minlength=len(self.histogram))

    def summary(self) -> dict[str, float | int]:
        """→ loss, perplexity, median_loss, num_tokens."""
        middle = int(np.searchsorted(self.histogram.cumsum(), (self.count + 1) / 2))
        loss = self.total / self.count
        return {
            "loss": loss,
            "perplexity": math.exp(min(loss, 700.0)),
            "median_loss": (middle + 0.5) / self.bins_per_nat,
            "num_tokens": self.count,
        }


class ClusteredMean:
    """Mean of values that come in clusters (windows of one document), and its standard error, in constant memory.

    The clusters must come one after the other. The standard error is the cluster-robust one: values of one document
    are not independent, so documents are what is counted.
    """

    def __init__(self) -> None:
        self.cluster: Any = None
        self.open = np.zeros(2)  # number and sum of the current cluster
        self.done = np.zeros(6)  # clusters, number, sum, sum of n², of n·s, of s²

    def add(self, value: float, cluster: Any) -> None:
        if cluster != self.cluster:
            self._close()
            self.cluster = cluster
        self.open += (1, value)

    def _close(self) -> None:
        number, total = self.open
        if number:
            self.done += (1, number, total, number**2, number * total, total**2)
        self.open = np.zeros(2)

    def estimate(self) -> tuple[float, float | None] | None:
        """→ mean and standard error, the latter `None` for one cluster; `None` without any value."""
        self._close()
        clusters, number, total, nn, ns, ss = self.done
        if not number:
            return None
        mean = float(total / number)
        if clusters < 2:
            return mean, None
        spread = max(ss - 2 * mean * ns + mean**2 * nn, 0.0)
        return mean, float(math.sqrt(spread * clusters / (clusters - 1)) / number)


class DocumentLosses:
    """Sums of losses by document and length, for intervals that hold for new documents.

    Args:
        lengths: evaluation lengths in tokens.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)
        self.sums: dict[int, np.ndarray] = {}  # document → number of targets, then the sum of losses at each length

    def add(self, document: int, length: int, losses: np.ndarray) -> None:
        """The losses of one window of a document, on the targets that all lengths share."""
        row = self.sums.setdefault(document, np.zeros(1 + len(self.lengths)))
        index = self.lengths.index(length)
        row[0] += losses.size if index == 0 else 0
        row[1 + index] += losses.sum(dtype=np.float64)

    def summary(self) -> dict[str, Any]:
        """→ `num_tokens`: targets of each document; `loss`: "L" → mean loss of each document.

        Of more than 256 documents neighbours are put together, so that 256 groups of documents are left.
        """
        rows = np.stack(list(self.sums.values()))
        if len(rows) > MAX_DOCUMENT_GROUPS:
            rows = np.stack([part.sum(axis=0) for part in np.array_split(rows, MAX_DOCUMENT_GROUPS)])
        means = rows[:, 1:] / rows[:, :1]
        loss = {str(length): means[:, index].tolist() for index, length in enumerate(self.lengths)}
        return {"num_tokens": rows[:, 0].astype(int).tolist(), "loss": loss}
