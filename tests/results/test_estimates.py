"""Intervals over runs and documents, by simulation and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from hf_relpos.results.estimates import Estimate, holm, p_text


# spreads of runs, documents and the rest, in nats as measured; numbers of runs and documents
DESIGNS = [(0.0145, 0.03, 0.01, 5, 23), (0.0145, 0.03, 0.01, 3, 23), (0.005, 0.03, 0.01, 5, 23)]
DESIGNS += [(0.0145, 0.06, 0.01, 5, 23), (0.02, 0.005, 0.01, 5, 40)]


@pytest.mark.parametrize("of_runs, of_documents, rest, num_runs, num_documents", DESIGNS)
def test_intervals_cover_what_they_say(of_runs, of_documents, rest, num_runs, num_documents):
    rng, trials = np.random.default_rng(1), 2000
    hits = 0
    for _ in range(trials):
        values = rng.normal(0, of_runs, (num_runs, 1)) + rng.normal(0, of_documents, (1, num_documents))
        found = Estimate.of(values + rng.normal(0, rest, (num_runs, num_documents)))
        hits += found.low < 0 < found.high
    assert 0.93 <= hits / trials <= 0.97


def test_without_documents_it_is_students_interval():
    values = np.array([[0.3], [0.1], [0.25], [0.2]])
    found = Estimate.of(values)
    expected = stats.ttest_1samp(values[:, 0], 0.0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_documents_are_weighted_by_their_tokens():
    values = np.array([[1.0, 3.0], [1.0, 3.0]])
    assert Estimate.of(values, [3, 1]).mean == pytest.approx(1.5)
    with pytest.raises(ValueError, match="one entry for each of 2 documents"):
        Estimate.of(values, [1, 1, 1])
    with pytest.raises(ValueError, match="matrix of runs × documents"):
        Estimate.of(np.zeros(3))


def test_what_does_not_vary_is_not_tested():
    assert math.isnan(Estimate.of(np.full((3, 4), 0.5)).p_value)
    one = Estimate.of(np.array([[0.5, 0.6]]))
    assert one.mean == pytest.approx(0.55) and math.isnan(one.low) and math.isnan(one.p_value)
    assert np.isnan(one.p_values_at(np.array([2, 9]))).all()


def test_the_p_values_of_other_numbers_of_runs():
    """Those of the same means with the variance between runs divided by the number, and of that number itself."""
    rng = np.random.default_rng(3)
    found = Estimate.of(0.01 + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.001, (1, 200)))
    counts = np.array([3, 4, 20])
    of_runs = found.run_variance * 3 / counts
    variance = of_runs + found.document_variance
    freedom = variance**2 / (of_runs**2 / (counts - 1) + found.document_variance**2 / 199)
    expected = 2 * stats.t.sf(found.mean / np.sqrt(variance), freedom)
    assert found.p_values_at(counts) == pytest.approx(expected) and expected[0] == pytest.approx(found.p_value)
    assert (found.p_values_at(counts, spread=2.0) > expected).all()


def test_how_well_few_runs_tell_their_spread():
    """80 % of the estimates lie so that the limits hold the true variance."""
    rng = np.random.default_rng(0)
    variances = rng.normal(0, 1, (20_000, 3)).var(axis=1, ddof=1)
    low, high = Estimate.of(rng.normal(0, 1, (3, 5))).spread_limits()
    assert np.mean((low * variances < 1) & (1 < high * variances)) == pytest.approx(0.8, abs=0.01)


def test_holm_and_p_values_in_words():
    assert holm([0.01, math.nan, 0.04, 0.03])[0] == pytest.approx(0.03)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert [p_text(p) for p in (0.0, 1e-9, 0.0123, math.nan)] == ["< 0.0001", "< 0.0001", "0.012", "–"]
