"""Needles in a haystack of RULER's kinds, for any language model: several keys, several values, chains of variables.

Paper: Hsieh et al. 2024, arXiv 2404.06654. Differs: answers are in order of appearance and scored token by token under
the right answer so far, without an example in front; all filler is that of `passkey_text`.
"""

from typing import Any

import numpy as np

from .base import register_task
from .passkey import TextFiller


ADJECTIVES = "quiet bright hollow gentle rapid bitter golden narrow frozen humble silent velvet".split()
NOUNS = "river lantern meadow anchor pepper violin harbor copper saddle walnut compass ribbon".split()
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# part of an answer, and whether it is scored
Piece = tuple[str, bool]


class NeedleTask(TextFiller):
    """Sentences at random places of the filler, in order, and a question about them. Each kind has another number of
    what the task counts; training draws kind and length."""

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(tokenizer)
        most = max(map(_number, self.kinds))
        rows = (self._encoded(np.random.default_rng(seed), most) for seed in range(20))
        # other words and numbers may take more tokens than those of these rows
        self.shortest = max(self._size(*row[:3]) for row in rows) + 16 * (most + 1)

    def _size(self, needles: list[list[int]], question: list[int], answer: list[int]) -> int:
        return sum(map(len, (self.opening_ids, *needles, question, answer)))

    def training_row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[bool]]:
        length = int(rng.integers(self.shortest, length + 1))
        return self.make_row(rng, length, str(rng.choice(self.kinds)))

    def make_row(self, rng: np.random.Generator, length: int, kind: str) -> tuple[list[int], list[bool]]:
        needles, question, answer, scored = self._encoded(rng, _number(kind))
        room = length - self._size(needles, question, answer)
        filler, size = self.filler(rng, room), len(self.sentence_ids)
        row, done = [*self.opening_ids], 0
        for place, needle in zip(sorted(rng.integers(0, room // size + 1, len(needles)) * size), needles):
            row, done = [*row, *filler[done:place], *needle], place
        row += [*filler[done:], *question]
        return row + answer, [False] * len(row) + scored

    def _encoded(
        self, rng: np.random.Generator, number: int
    ) -> tuple[list[list[int]], list[int], list[int], list[bool]]:
        """→ tokens of the needles, the question and the answer, and which of the answer are scored."""
        needles, question, pieces = self.texts(rng, number)
        answer, scored = [], []
        for text, counts in pieces:
            tokens = self.encode(text)
            answer, scored = answer + tokens, scored + [counts] * len(tokens)
        return [self.encode(needle) for needle in needles], self.encode(question), answer, scored

    def texts(self, rng: np.random.Generator, number: int) -> tuple[list[str], str, list[Piece]]:
        """→ the needles in order, the question, and the answer in pieces."""
        raise NotImplementedError


def _number(kind: str) -> int:
    """ "4 keys" → 4."""
    return int(kind.split()[0])


def _keys(rng: np.random.Generator, number: int) -> list[str]:
    chosen = rng.choice(len(ADJECTIVES) * len(NOUNS), number, replace=False)
    return [f"{ADJECTIVES[index % len(ADJECTIVES)]}-{NOUNS[index // len(ADJECTIVES)]}" for index in chosen]


def _numbers(rng: np.random.Generator, number: int, digits: int) -> list[str]:
    return [str(10 ** (digits - 1) + each) for each in rng.choice(9 * 10 ** (digits - 1), number, replace=False)]


def _listed(words: list[str]) -> list[Piece]:
    """→ " a", ",", " b": the words are scored, the commas are not."""
    pieces = [piece for word in words for piece in ((f" {word}", True), (",", False))]
    return pieces[:-1]


@register_task("needle_keys")
class NeedleKeys(NeedleTask):
    """Several keys: a number for each of some words, hidden in plain English; the number of one word is asked for, the
    others distract (RULER's multi-key needles)."""

    kinds = ("2 keys", "8 keys")
    opening = "Special magic numbers are hidden within the following text. Memorize them.\n"

    def texts(self, rng: np.random.Generator, number: int) -> tuple[list[str], str, list[Piece]]:
        keys, values = _keys(rng, number), _numbers(rng, number, 7)
        needles = [f"The special magic number for {key} is: {value}.\n" for key, value in zip(keys, values)]
        asked = int(rng.integers(number))
        question = f"What is the special magic number for {keys[asked]}? The special magic number for {keys[asked]} is:"
        return needles, question, [(f" {values[asked]}", True)]


@register_task("needle_values")
class NeedleValues(NeedleTask):
    """Several values: numbers for one word, hidden in plain English; all are asked for, in order (RULER's multi-value
    needles)."""

    score_name = "accuracy of the values' tokens"
    kinds = ("2 values", "4 values")
    whole_answers = False
    opening = NeedleKeys.opening

    def texts(self, rng: np.random.Generator, number: int) -> tuple[list[str], str, list[Piece]]:
        (key,), values = _keys(rng, 1), _numbers(rng, number, 7)
        needles = [f"One of the special magic numbers for {key} is: {value}.\n" for value in values]
        question = f"What are all the special magic numbers for {key}, in order? They are:"
        return needles, question, _listed(values)


@register_task("variable_tracking")
class VariableTracking(NeedleTask):
    """Chains of variables: one is given a number, the next ones are each given the one before, all far apart in plain
    English; the names of all that have the number are asked for, in order (RULER's variable tracking)."""

    score_name = "accuracy of the names' tokens"
    kinds = ("1 hop", "4 hops")
    whole_answers = False
    opening = "Memorize and track the chain of variable assignments hidden in the following text.\n"

    def texts(self, rng: np.random.Generator, number: int) -> tuple[list[str], str, list[Piece]]:
        names, (value,) = [], _numbers(rng, 1, 5)
        while len(names) <= number:
            name = "".join(rng.choice([*LETTERS], 5))
            names += [name] if name not in names else []
        needles = [f"VAR {names[0]} = {value}\n"]
        needles += [f"VAR {after} = VAR {before}\n" for before, after in zip(names, names[1:])]
        question = f"Which {number + 1} variables are assigned the value {value}, in order? They are:"
        return needles, question, _listed(names)
