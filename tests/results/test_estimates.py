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
    assert one.runs_needed() is None


def test_the_number_of_runs_that_would_resolve_a_difference():
    rng = np.random.default_rng(3)
    values = 0.01 + rng.normal(0, 0.02, (3, 1)) + rng.normal(0, 0.001, (1, 200))
    found = Estimate.of(values)
    needed = found.runs_needed()
    assert found.p_value > 0.05 and needed > 3
    # so many runs with the same variance resolve it, one fewer does not
    for count, resolved in ((needed, True), (needed - 1, False)):
        error = math.sqrt(found.run_variance * 3 / count + found.document_variance)
        assert (abs(found.mean) / error > stats.t.ppf(0.975, count - 1)) == resolved
    few_documents = Estimate.of(0.01 + rng.normal(0, 0.001, (3, 1)) + rng.normal(0, 0.2, (1, 5)))
    assert few_documents.runs_needed() is None


def test_holm_and_p_values_in_words():
    assert holm([0.01, math.nan, 0.04, 0.03])[0] == pytest.approx(0.03)
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert [p_text(p) for p in (0.0, 1e-9, 0.0123, math.nan)] == ["< 0.0001", "< 0.0001", "0.012", "–"]
