"""Passkey retrieval: find a key that is hidden at some depth of a long row."""

from typing import Any, ClassVar

import numpy as np

from .base import Task, register_task


# where the key stands, as a share of what comes before the question
DEPTHS = ("depth 0", "depth 0.25", "depth 0.5", "depth 0.75", "depth 1")


class DepthTask(Task):
    """A key hidden at some depth in filler, asked for at the end."""

    kinds = DEPTHS

    def training_row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[bool]]:
        length = int(rng.integers(self.shortest, length + 1))
        return self._row(rng, length, rng.random())

    def make_row(self, rng: np.random.Generator, length: int, kind: str) -> tuple[list[int], list[bool]]:
        return self._row(rng, length, float(kind.removeprefix("depth ")))

    def _row(self, rng: np.random.Generator, length: int, depth: float) -> tuple[list[int], list[bool]]:
        before, needle, question, key = self.parts(rng)
        room = length - sum(map(len, (before, needle, question, key)))
        filler = self.filler(rng, room)
        place = round(depth * room)
        row = [*before, *filler[:place], *needle, *filler[place:], *question]
        return row + key, [False] * len(row) + [True] * len(key)

    def parts(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int], list[int]]:
        """→ the opening, the sentence with the key, the question, and the key as its answer."""
        raise NotImplementedError

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        """→ `length` tokens that hold no information."""
        raise NotImplementedError


@register_task("passkey")
class Passkey(DepthTask):
    """Passkey retrieval in symbols, small enough to be learned in minutes: four digits after a mark, anywhere among
    random letters, asked for at the end. Trained on rows of all lengths up to `block_size`, the key at any depth."""

    words = tuple("abcdefghijklmnopqrstuvwxyz0123456789#?")
    shortest = 16

    def parts(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int], list[int]]:
        key = [self.ids[str(digit)] for digit in rng.integers(0, 10, 4)]
        return self.start, [self.ids["#"], *key], [self.ids["?"]], key

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        return [self.ids[self.words[index]] for index in rng.integers(0, 26, length)]


class TextFiller(Task):
    """A task in plain English, for a language model with any tokenizer, among sentences that repeat."""

    opening: ClassVar[str]
    sentences = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(tokenizer)
        self.opening_ids, self.sentence_ids = [*self.start, *self.encode(self.opening)], self.encode(self.sentences)

    def encode(self, text: str) -> list[int]:
        """→ the tokens of a text alone."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        """→ `length` tokens of the sentences."""
        return (self.sentence_ids * (length // len(self.sentence_ids) + 1))[:length]


@register_task("passkey_text")
class TextPasskey(TextFiller, DepthTask):
    """Passkey retrieval in plain English, for a language model with any tokenizer: a number of five digits, stated once
    among sentences that repeat, asked for at the end. Paper: Mohtashami and Jaggi 2023, arXiv 2305.16300."""

    opening = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(tokenizer)
        # another number may take more tokens: at most one for each of its 15 digits
        self.shortest = sum(map(len, self.parts(np.random.default_rng(0)))) + 15

    def parts(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int], list[int]]:
        key = int(rng.integers(10_000, 100_000))
        needle = self.encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
        question = self.encode("What is the pass key? The pass key is")
        return self.opening_ids, needle, question, self.encode(f" {key}")
