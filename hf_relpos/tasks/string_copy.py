"""String copy: repeat a string that is longer than any in training."""

import numpy as np

from .base import Task, register_task


@register_task("string_copy")
class StringCopy(Task):
    """Repeat a string of random letters: <|startoftext|> x₁ … xₙ = x₁ … xₙ <|endoftext|>.

    Trained on n ~ U{1..N}, N = (length − 3) / 2, tested at n = N of longer rows: a scheme that extrapolates copies
    strings that are longer than any it saw. Paper: Kazemnejad et al. 2023, arXiv 2305.19466.
    """

    words = tuple("abcdefghijklmnopqrstuvwxyz=")

    def training_row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[bool]]:
        return self._row(rng, int(rng.integers(1, (length - 3) // 2 + 1)))

    def make_row(self, rng: np.random.Generator, length: int, kind: str) -> tuple[list[int], list[bool]]:
        return self._row(rng, (length - 3) // 2)

    def _row(self, rng: np.random.Generator, size: int) -> tuple[list[int], list[bool]]:
        string = [self.ids[self.words[index]] for index in rng.integers(0, len(self.words) - 1, size)]
        return [*self.start, *string, self.ids["="], *string, self.end], [False] * (size + 2) + [True] * (size + 1)


@register_task("string_copy_words")
class WordCopy(StringCopy):
    """String copy with 512 words instead of 26 letters, closer to the paper's, which draws from a model's whole
    vocabulary: few words come twice in a string, so that what was just copied says what comes next."""

    words = (*(f"w{index}" for index in range(512)), "=")


@register_task("string_copy_tokens")
class WordCopyByToken(WordCopy):
    """The same rows, each token scored by itself: partly right copies count."""

    score_name = "accuracy of copied tokens"
    whole_answers = False
