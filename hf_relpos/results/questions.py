"""What an experiment answers: for each question every pair of settings, at the one length that the question is about.

The questions of results on text: which setting has the lowest loss at the training length, which at the longest length,
and whose loss changes with the length. Of a task: which has the best score, for each kind of row at the longest length.
Runs are paired by seed and documents by themselves; p-values are corrected for all pairs of a question (Holm).
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .estimates import CONFIDENCE, Estimate, holm, p_text
from .groups import Group
from .result_file import SLIDING


MAX_SEEDS = 200  # more are not thought of
Matrix = dict[int, np.ndarray]  # seed → a value for each document


@dataclass(frozen=True)
class Question:
    """What is compared.

    Attributes:
        title: the question, as a heading.
        place: where: "at 128 tokens".
        values: group → seed → the value of each document.
        is_score: whether the values are scores, of which more is better, or losses in nats.
        is_change: whether the values are changes, which are tested against 0 themselves.
        outcomes: of changes, how a sentence begins about those that fall, those that rise, and the rest.
    """

    title: str
    place: str
    values: Callable[[Group], Matrix]
    is_score: bool = False
    is_change: bool = False
    outcomes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pair:
    """Two settings.

    Attributes:
        first, second: labels.
        difference: of the values, first − second.
        corrected: p-value, corrected for all pairs of the question.
    """

    first: str
    second: str
    difference: Estimate
    corrected: float

    @property
    def resolved(self) -> bool:
        """Whether it is known at 5 %, over all pairs of the question together, which of the two is larger."""
        return self.corrected < 1 - CONFIDENCE


@dataclass
class Answer:
    """The settings and their pairs.

    Attributes:
        question: what was asked.
        values: label → the setting's own value, the best one first.
        pairs: all pairs.
        changes: of a question about changes: label → corrected p-value of the change itself.
        num_documents: that were read, of which many are put together in the values; 1 of a task.
    """

    question: Question
    values: dict[str, Estimate]
    pairs: list[Pair]
    changes: dict[str, float]
    num_documents: int = 1

    @property
    def best(self) -> str:
        """The label of the setting with the best mean."""
        return next(iter(self.values))

    def pair(self, first: str, second: str) -> Pair:
        """The pair of two settings, with the difference first − second; raises `KeyError` for pairs without seeds in
        common."""
        for pair in self.pairs:
            if (pair.first, pair.second) == (first, second):
                return pair
            if (pair.first, pair.second) == (second, first):
                return Pair(first, second, _negative(pair.difference), pair.corrected)
        raise KeyError((first, second))

    def seeds_needed(self, pair: Pair) -> list[int | None]:
        """How many seeds would resolve a pair beside all others, if the means stay: where seeds vary as little as can
        be (see `Estimate.spread_limits`), as they did, and as much as can be; `None` for more than 200, or if the
        documents leave too much doubt."""
        counts = np.arange(pair.difference.num_runs + 1, MAX_SEEDS + 1)
        names = {pair.first, pair.second}
        others = [each.difference.p_values_at(counts) for each in self.pairs if {each.first, each.second} != names]
        low, high = pair.difference.spread_limits()
        found = []
        for spread in (low, 1.0, high):
            rows = np.stack([pair.difference.p_values_at(counts, spread), *others])
            corrected = (holm(column)[0] for column in rows.T.tolist())
            found.append(next((int(n) for n, p in zip(counts, corrected) if p < 1 - CONFIDENCE), None))
        return found


def answers(groups: Sequence[Group]) -> list[Answer]:
    """The answers that results give, for all settings that were evaluated at the lengths in question.

    Raises:
        ValueError: if the settings were scored on other tokens.
    """
    runs = [run for group in groups if group.by_document for run in group.by_seed.values() if run.get("documents")]
    if len({tuple(run["documents"]["num_tokens"]) for run in runs}) > 1:
        raise ValueError(
            "results of different experiments are not compared: they were scored on other tokens of the text, by "
            "another tokenizer or other `eval_lengths`."
        )
    return [_answer(question, groups) for question in _questions(groups)]


def _questions(groups: Sequence[Group]) -> list[Question]:
    if groups[0].score_name:
        return _task_questions(groups)
    lengths = sorted(set.intersection(*(set(group.lengths()) for group in groups)))
    train_lengths = {group.train_length for group in groups}
    found = []
    if len(train_lengths) == 1 and (base := train_lengths.pop()) in lengths:
        found.append(Question("Which trains best?", f"at {base} tokens", lambda group: group.losses(base)))
        if lengths[-1] > base:
            long = lengths[-1]
            text = f"at {long} tokens"
            found.append(Question("Which is best past its training length?", text, lambda group: group.losses(long)))
            found.append(_change_with_length(base, long))
            if all(group.has_sliding_baseline for group in groups):
                found.append(_change_from_sliding(base, long))
    elif lengths:
        found = [_length_question(length) for length in dict.fromkeys((lengths[0], lengths[-1]))]
    return found


def _length_question(length: int) -> Question:
    return Question(f"Which is best at {length}?", f"at {length} tokens", lambda group: group.losses(length))


def _change_with_length(base: int, long: int) -> Question:
    start = f"Read at {long} instead of {base} tokens, "
    outcomes = tuple(start + end for end in ("perplexity falls", "perplexity rises", "no change is resolved"))
    place, title = f"from {base} to {long} tokens", "Whose loss changes with the length?"
    return Question(title, place, changes_between(base, long), is_change=True, outcomes=outcomes)


def _change_from_sliding(base: int, long: int) -> Question:
    start = f"Beside a window of {base} tokens that slides over the same text, reading {long} at once is "
    outcomes = tuple(start + end for end in ("better", "worse", "no better and no worse, as far as is resolved"))
    place = f"from a sliding window of {base} to {long} tokens"
    title = "Who gains over a sliding window of the training length?"
    return Question(title, place, changes_between(SLIDING, long), is_change=True, outcomes=outcomes)


def changes_between(base: int | str, long: int) -> Callable[[Group], Matrix]:
    """Group → seed → the log ratio of each document's perplexity at a length to that at another."""

    def values(group: Group) -> Matrix:
        before, after = group.losses(base), group.losses(long)
        return {seed: after[seed] - before[seed] for seed in before}

    return values


def _task_questions(groups: Sequence[Group]) -> list[Question]:
    longest = str(groups[0].lengths()[-1])
    found = []
    for condition in groups[0].conditions():
        length, _, kind = condition.partition(" ")
        if length == longest:
            place = f"at {length} tokens" + (f" ({kind})" if kind else "")
            found.append(Question(f"Which is best {place}?", place, _scores(condition), is_score=True))
    return found


def _scores(condition: str) -> Callable[[Group], Matrix]:
    return lambda group: {seed: np.array([value]) for seed, value in group.values(condition, "score").items()}


def _answer(question: Question, groups: Sequence[Group]) -> Answer:
    matrices = {group.label: question.values(group) for group in groups}
    weights = None if question.is_score else groups[0].document_weights
    own = {label: Estimate.of(np.stack(list(matrix.values())), weights) for label, matrix in matrices.items()}
    sign = -1 if question.is_score else 1
    order = dict(sorted(own.items(), key=lambda item: round(sign * item[1].mean, 7)))  # as they are stored
    found = []
    for first, second in itertools.combinations(order, 2):
        seeds = sorted({*matrices[first]} & {*matrices[second]})
        if seeds:
            rows = np.stack([matrices[first][seed] - matrices[second][seed] for seed in seeds])
            found.append((first, second, Estimate.of(rows, weights)))
    corrected = holm([difference.p_value for _, _, difference in found])
    pairs = [Pair(*each, p_value) for each, p_value in zip(found, corrected)]
    changes = dict(zip(order, holm([value.p_value for value in order.values()]))) if question.is_change else {}
    num_documents = 1 if question.is_score else max(group.num_documents for group in groups)
    return Answer(question, order, pairs, changes, num_documents)


def _negative(estimate: Estimate) -> Estimate:
    return replace(estimate, mean=-estimate.mean, low=-estimate.high, high=-estimate.low)


# --- in words


def sentences(answer: Answer) -> list[str]:
    """The answer in a few sentences, with what is resolved and what is not."""
    return _about_changes(answer) if answer.question.is_change else _about_levels(answer)


def _about_levels(answer: Answer) -> list[str]:
    best, others = answer.best, list(answer.values)[1:]
    level = level_text(answer.question, answer.values[best])
    first = f"Best {answer.question.place}: **{best}** ({level})."
    if not others:
        return [first]
    clear, unclear, same, apart = [], [], [], []
    for label in others:
        try:
            pair = answer.pair(label, best)
        except KeyError:
            apart.append(label)
            continue
        if pair.difference.is_zero:
            same.append(label)
        elif pair.resolved:
            clear.append(f"{label} ({difference_text(answer.question, pair.difference)})")
        else:
            unclear.append(f"{label} ({difference_text(answer.question, pair.difference)}; {_needed(answer, pair)})")
    if same == others:
        return [f"No setting is best {answer.question.place}: all have {level}."]
    found = [first]
    if same:
        found.append(f"The same as it with every seed: {', '.join(same)}.")
    if unclear:
        found.append(f"Not resolved from it {_evidence(answer)}: {', '.join(unclear)}.")
    if clear:
        found.append(f"Worse, resolved: {', '.join(clear)}.")
    if apart:
        found.append(f"Not compared with it, as no seed is in common: {', '.join(apart)}.")
    return found


def _about_changes(answer: Answer) -> list[str]:
    up, down, unclear = [], [], []
    for label, change in answer.values.items():
        text = f"**{label}** ({percent(change.mean)})"
        if not answer.changes[label] < 1 - CONFIDENCE:
            unclear.append(text)
        else:
            (up if change.mean > 0 else down).append(text)
    falls, rises, rest = answer.question.outcomes
    parts = [(falls, down), (rises, up), (f"{rest} {_evidence(answer)}", unclear)]
    return [f"{start}: {', '.join(labels)}." for start, labels in parts if labels]


def _evidence(answer: Answer) -> str:
    """ "at 3 seeds and 23 documents"."""
    compared = [] if answer.question.is_change else [pair.difference for pair in answer.pairs]
    runs = sorted({each.num_runs for each in compared or answer.values.values()})
    documents = answer.num_documents
    count = str(runs[0]) if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    seeds = f"{count} seed{'s' if runs[-1] > 1 else ''}"
    return f"at {seeds} and {documents} documents" if documents > 1 else f"at {seeds}"


def _needed(answer: Answer, pair: Pair) -> str:
    """How many seeds would resolve a pair."""
    if pair.difference.num_runs < 2:
        return "one seed says nothing"
    if not pair.difference.run_variance:
        return "the runs do not vary"
    least, likely, most = answer.seeds_needed(pair)
    if likely is None:
        return f"more seeds alone {'would' if least is None else 'may'} not resolve it"
    words = f"about {likely} seeds would resolve it"
    return words if least == most else f"{words}, {least} to {most or f'over {MAX_SEEDS}'} at 80 % confidence"


def level_text(question: Question, value: Estimate) -> str:
    """A setting's own value: a perplexity with its interval, or a score."""
    if question.is_score:
        return f"{value.mean:.3f}" + interval_text(value.low, value.high, ".3f")
    if question.is_change:
        return percent(value.mean) + interval_text(value.low, value.high, "", percent)
    low, high = (math.exp(min(x, 700.0)) for x in (value.low, value.high))
    return f"perplexity {math.exp(min(value.mean, 700.0)):.2f}" + interval_text(low, high, ".2f")


def difference_text(question: Question, difference: Estimate) -> str:
    """A difference of scores, or of losses as a change of the perplexity."""
    if question.is_score:
        return f"{difference.mean:+.3f}" + interval_text(difference.low, difference.high, "+.3f")
    return percent(difference.mean) + interval_text(difference.low, difference.high, "", percent)


def interval_text(low: float, high: float, form: str, write: Callable[[float], str] | None = None) -> str:
    """ ", 1.20 to 1.30"; nothing for one run, or where nothing varies."""
    if math.isnan(low) or low == high:
        return ""
    low_text, high_text = (write(x) if write else format(x, form) for x in (low, high))
    return f", {low_text} to {high_text}"


def percent(difference: float) -> str:
    """A difference of losses in nats → the change of the perplexity."""
    return f"{100 * math.expm1(min(difference, 700.0)):+.1f} %"


def pair_rows(answer: Answer) -> list[list[str]]:
    """A matrix of all pairs, the best setting first: row − column, marked * where it is resolved; the head first."""
    labels = list(answer.values)
    rows = [["", *labels]]
    for row in labels:
        cells = []
        for column in labels:
            try:
                pair = answer.pair(row, column)
            except KeyError:
                cells.append("" if row == column else "–")
                continue
            mean = pair.difference.mean
            text = f"{mean:+.3f}" if answer.question.is_score else percent(mean)
            cells.append(text + ("*" if pair.resolved else ""))
        rows.append([row, *cells])
    return rows


def detail_rows(answer: Answer) -> list[list[str]]:
    """Each pair with its difference, interval and p-values; the head first."""
    unit = "score" if answer.question.is_score else "nats"
    rows = [["pair", "seeds", "documents", f"difference ({unit})", "95 % interval", "p", "corrected p"]]
    for pair in answer.pairs:
        each = pair.difference
        interval = "–" if math.isnan(each.low) else f"{each.low:+.4f} to {each.high:+.4f}"
        p_values = p_text(each.p_value), p_text(pair.corrected)
        counts = str(each.num_runs), str(answer.num_documents)
        rows.append([f"{pair.first} − {pair.second}", *counts, f"{each.mean:+.4f}", interval, *p_values])
    return rows
