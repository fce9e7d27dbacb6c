"""Means over runs and documents, with intervals that hold for new runs on new text.

Runs (seeds) and documents are crossed: each run reads the same documents. With R runs and D documents,
Var(mean) ≈ s²(run means)/R + s²(document means)/D, with the degrees of freedom of Satterthwaite (1946). An interval
over seeds alone would say what another seed does on the same text, not what happens on other text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


CONFIDENCE = 0.95
MAX_RUNS_NEEDED = 200
ROUNDING = 1e-8  # losses are stored with eight digits: a smaller spread is none


@dataclass(frozen=True)
class Estimate:
    """A mean over runs × documents.

    Attributes:
        mean: of the values, documents weighted by their tokens.
        low, high: ends of the 95 % interval for new runs and new documents; NaN for one run.
        p_value: two-sided, of the hypothesis that the mean is 0; NaN where nothing varies or for one run.
        num_runs, num_documents: R and D; D is 1 where losses per document are not known, and the interval then holds
            for other runs on the same text.
        run_variance, document_variance: their parts of the variance of the mean.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_runs: int
    num_documents: int
    run_variance: float
    document_variance: float

    @classmethod
    def of(cls, values: np.ndarray, weights: Sequence[float] | None = None) -> "Estimate":
        """From (R, D) values and the weights of the documents; equal weights by default.

        Raises:
            ValueError: if `values` is empty, no matrix, or does not fit the weights.
        """
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 2 or not values.size:
            raise ValueError(f"`values` must be a matrix of runs × documents, got the shape {values.shape}.")
        num_runs, num_documents = values.shape
        shares = np.ones(num_documents) if weights is None else np.asarray(weights, dtype=np.float64)
        if shares.shape != (num_documents,):
            raise ValueError(f"`weights` must have one entry for each of {num_documents} documents.")
        shares = shares / shares.sum()
        run_means, document_means = values @ shares, values.mean(axis=0)
        mean = float(run_means.mean())
        of_documents = 0.0
        if num_documents > 1:
            spread = float((shares**2 * (document_means - mean) ** 2).sum())
            of_documents = num_documents / (num_documents - 1) * spread
        of_runs = float(run_means.var(ddof=1)) / num_runs if num_runs > 1 else math.nan
        half, p_value = _test(mean, of_runs, of_documents, num_runs, num_documents)
        return cls(mean, mean - half, mean + half, p_value, num_runs, num_documents, of_runs, of_documents)

    def runs_needed(self, level: float = 1 - CONFIDENCE) -> int | None:
        """How many runs would resolve this mean from 0 at a two-sided level, if runs go on to vary as these do.

        Returns:
            the number, or `None` if the documents alone leave too much doubt, or if 200 runs are not enough.
        """
        if self.num_runs < 2:
            return None
        for num_runs in range(2, MAX_RUNS_NEEDED + 1):
            of_runs = self.run_variance * self.num_runs / num_runs
            _, p_value = _test(self.mean, of_runs, self.document_variance, num_runs, self.num_documents)
            if p_value < level:
                return num_runs
        return None


def _test(mean: float, of_runs: float, of_documents: float, num_runs: int, num_documents: int) -> tuple[float, float]:
    """→ half the width of the 95 % interval, and the p-value of the mean against 0."""
    from scipy import stats

    variance = of_runs + of_documents
    if not variance > (ROUNDING * (1 + abs(mean))) ** 2:  # one run, or nothing varies: no test can be made
        return (math.nan if math.isnan(variance) else 0.0), math.nan
    terms = [(of_runs, num_runs - 1), (of_documents, num_documents - 1)]
    freedom = variance**2 / sum(part**2 / count for part, count in terms if part)
    error = math.sqrt(variance)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return half, float(2 * stats.t.sf(abs(mean) / error, freedom))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979): step-down, holds the family-wise error; NaN entries stay and do not count."""
    order = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    corrected, largest = [math.nan] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def p_text(p_value: float) -> str:
    """A p-value as tables show it; never 0."""
    if math.isnan(p_value):
        return "–"
    return "< 0.0001" if p_value < 1e-4 else f"{p_value:.2g}"
