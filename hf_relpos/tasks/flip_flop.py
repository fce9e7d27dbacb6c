"""Flip-flop: remember one bit across many that do not count."""

from typing import ClassVar

import numpy as np

from .base import Task, register_task


@register_task("flip_flop")
class FlipFlop(Task):
    """Remember one bit: pairs of an instruction and a bit, write (w), ignore (i) or read (r); after r the bit is the
    one last written.

    The first instruction is w and the last r; between them i has probability p, w and r (1 − p) / 2 each. p is 0.8 in
    training; with p = 0.98 ("sparse") the bit was written far away, with p = 0.1 ("dense") many others lie between.
    Each read is scored by itself. Paper: Liu et al. 2023, arXiv 2306.00946; there rows have 512 tokens.
    """

    score_name = "accuracy of reads"
    words = ("w", "i", "r", "0", "1")
    kinds = ("p=0.8", "sparse", "dense")
    ignored: ClassVar[dict[str, float]] = {"p=0.8": 0.8, "sparse": 0.98, "dense": 0.1}
    whole_answers = False

    def make_row(self, rng: np.random.Generator, length: int, kind: str) -> tuple[list[int], list[bool]]:
        ignored, size = self.ignored[kind], length // 2
        share = (1 - ignored) / 2
        instructions = ["w", *rng.choice(["w", "i", "r"], size - 2, p=[share, ignored, share]), "r"]
        bits, written, tokens, answers = rng.integers(0, 2, size), 0, [], []
        for instruction, bit in zip(instructions, bits):
            written = int(bit) if instruction == "w" else written
            shown = written if instruction == "r" else int(bit)
            tokens += [self.ids[instruction], self.ids[str(shown)]]
            answers += [False, instruction == "r"]
        return tokens, answers
