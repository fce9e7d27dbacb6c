"""Means over runs and documents, with intervals that hold for new runs on new text.

Runs (seeds) and documents are crossed: each run reads the same documents. With R runs and D documents,
Var(mean) ≈ s²(run means)/R + s²(document means)/D, with the degrees of freedom of Satterthwaite (1946). An interval
over seeds alone would say what another seed does on the same text, not what happens on other text.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


CONFIDENCE = 0.95
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
        document_freedom: degrees of freedom of the latter: documents that weigh differently count for fewer,
            1 / Σ shares², less 1.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_runs: int
    num_documents: int
    run_variance: float
    document_variance: float
    document_freedom: float = 0.0

    @property
    def is_zero(self) -> bool:
        """Whether it is 0 in every run and document, to the digits that are stored."""
        return max(abs(self.mean), abs(self.low - self.high) if self.num_runs > 1 else 0.0) < ROUNDING

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
        freedom = 1 / float((shares**2).sum()) - 1
        half, p_value = map(float, _test(mean, of_runs, of_documents, num_runs, freedom))
        return cls(mean, mean - half, mean + half, p_value, num_runs, num_documents, of_runs, of_documents, freedom)

    def p_values_at(self, counts: np.ndarray, spread: float = 1.0) -> np.ndarray:
        """The p-values that so many runs would give, of the same mean and on the same documents.

        Args:
            counts: (N,) numbers of runs, of at least 2.
            spread: the variance between runs, as a multiple of the one that was found.

        Returns:
            (N,) p-values; NaN for one run, or where nothing varies.
        """
        of_runs = spread * self.run_variance * self.num_runs / counts
        return _test(self.mean, of_runs, self.document_variance, counts, self.document_freedom)[1]

    def spread_limits(self) -> tuple[float, float]:
        """Between which multiples of the variance that was found the variance between runs lies, with a probability
        of 80 %: 3 runs tell it within a factor of 0.4 to 9.5."""
        from scipy import stats

        freedom = self.num_runs - 1
        return freedom / float(stats.chi2.ppf(0.9, freedom)), freedom / float(stats.chi2.ppf(0.1, freedom))


def _test(mean: float, of_runs: Any, of_documents: float, num_runs: Any, freedom: float) -> tuple[Any, Any]:
    """→ half the width of the 95 % interval, and the p-value of the mean against 0; for one number of runs or more."""
    from scipy import stats

    variance = of_runs + of_documents
    with np.errstate(divide="ignore", invalid="ignore"):
        of_freedom = np.square(of_runs) / (num_runs - np.float64(1))
        if of_documents:
            of_freedom = of_freedom + of_documents**2 / freedom
        of_both = np.square(variance) / of_freedom
        error = np.sqrt(variance)
        half = stats.t.ppf((1 + CONFIDENCE) / 2, of_both) * error
        p_value = 2 * stats.t.sf(abs(mean) / error, of_both)
    varies = variance > (ROUNDING * (1 + abs(mean))) ** 2  # else one run, or no test can be made
    return np.where(varies, half, np.where(np.isnan(variance), math.nan, 0.0)), np.where(varies, p_value, math.nan)


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
