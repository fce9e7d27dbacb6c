"""Synthetic tasks: rows whose answer is known, made at any length, so that a model trained short can be tested long.

A task is one small class under `register_task`. Its rows are token ids and a mask of the tokens that are the answer;
only those are trained and scored. An answer counts as right where the greedy choice at each of its tokens is the right
one: by induction that is what greedy generation gives, at the price of one forward pass.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import tokenizers
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from ..data.corpus import Corpus, digest
from ..evaluation.loss_by_length import evaluation_mode


TASKS: dict[str, type["Task"]] = {}
# a model trained on a task sees new rows all the time: so many before any comes again
NUM_TRAINING_ROWS, NUM_VALIDATION_ROWS = 2**20, 256
TRAINING, VALIDATION, TEST = range(3)  # rows of the same index and seed differ by these


def register_task(name: str) -> Callable[[type["Task"]], type["Task"]]:
    """Makes a task known by `name`."""

    def register(cls: type["Task"]) -> type["Task"]:
        cls.name = name
        TASKS[name] = cls
        return cls

    return register


def make_task(name: str, tokenizer: Any = None) -> "Task":
    """The task of that name, for a model with that tokenizer; by default for one with the task's own.

    Raises:
        ValueError: for an unknown name, or a tokenizer that lacks words of the task.
    """
    check_task(name)
    return TASKS[name](tokenizer)


def check_task(name: str) -> None:
    """Raises `ValueError` for a name that is no task's."""
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {name!r}.")


class Task:
    """What all tasks share.

    Attributes:
        name: what `--task` takes.
        score_name: what is scored.
        words: the task's own vocabulary, in the order of their ids after the special tokens; empty for a task in the
            words of any tokenizer.
        kinds: kinds of test rows, each scored apart; the first is what training sees most like.
        whole_answers: whether a row counts as a whole, right or wrong, or each token of its answers by itself.
        shortest: tokens of the shortest row.
    """

    name: ClassVar[str]
    score_name: ClassVar[str] = "exact match"
    words: ClassVar[tuple[str, ...]] = ()
    kinds: ClassVar[tuple[str, ...]] = ("",)
    whole_answers: ClassVar[bool] = True
    shortest: int = 5

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = self.make_tokenizer() if tokenizer is None else tokenizer
        self.end = self.tokenizer.eos_token_id
        vocabulary = self.tokenizer.get_vocab()
        missing = [word for word in self.words if word not in vocabulary]
        if missing:
            raise ValueError(
                f"`task` {self.name!r} is for models with its own words: the tokenizer lacks {missing[0]!r}."
            )
        self.ids = {word: vocabulary[word] for word in self.words}

    def make_tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of the task's words, parted by spaces."""
        if not self.words:
            raise ValueError(f"`tokenizer_name` or a saved model is needed: `task` {self.name!r} is in plain text.")
        vocabulary = {word: index for index, word in enumerate(("<|endoftext|>", "<|pad|>", *self.words))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<|pad|>"))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
        )

    @property
    def fingerprint(self) -> str:
        """What tells one version of the rows from another."""
        return digest("task", self.name, [self.make_row(self.rng(0, TEST, kind, 0), 100, kind) for kind in self.kinds])

    @staticmethod
    def rng(seed: int, use: int, kind: str, index: int) -> np.random.Generator:
        """Random numbers for one row, apart from those of any other."""
        return np.random.default_rng([seed, use, *kind.encode(), index])

    def check_length(self, name: str, length: int) -> None:
        """Raises `ValueError` for rows that are too short."""
        if length < self.shortest:
            raise ValueError(f"`{name}` must be at least {self.shortest} for task {self.name!r}, got {length}.")

    def training_row(self, rng: np.random.Generator, length: int) -> tuple[list[int], list[bool]]:
        """A row of at most `length` tokens, as in training → tokens, which of them are the answer."""
        return self.make_row(rng, length, self.kinds[0])

    def make_row(self, rng: np.random.Generator, length: int, kind: str) -> tuple[list[int], list[bool]]:
        """A test row as long as `length` allows → tokens, which of them are the answer."""
        raise NotImplementedError


@register_task("string_copy")
class StringCopy(Task):
    """Repeat a string of random letters: <|endoftext|> x₁ … xₙ = x₁ … xₙ <|endoftext|>.

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
        return [self.end, *string, self.ids["="], *string, self.end], [False] * (size + 2) + [True] * (size + 1)


@register_task("string_copy_words")
class WordCopy(StringCopy):
    """String copy with 512 words in place of 26 letters, closer to the paper's, which draws from a model's whole
    vocabulary: few words come twice in a string, so that what was just copied says what comes next."""

    words = (*(f"w{index}" for index in range(512)), "=")


@register_task("string_copy_tokens")
class WordCopyByToken(WordCopy):
    """The same rows, each token scored by itself: how far a copy goes that is not whole."""

    score_name = "accuracy of copied tokens"
    whole_answers = False


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
            told = written if instruction == "r" else int(bit)
            tokens += [self.ids[instruction], self.ids[str(told)]]
            answers += [False, instruction == "r"]
        return tokens, answers


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
        """→ what opens the row, what tells the key, the question, and the key as its answer."""
        raise NotImplementedError

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        """→ so many tokens that say nothing."""
        raise NotImplementedError


@register_task("passkey")
class Passkey(DepthTask):
    """Passkey retrieval in symbols, small enough to be learned in minutes: four digits after a mark, anywhere among
    random letters, asked for at the end. Trained on rows of all lengths up to `block_size`, the key at any depth."""

    words = tuple("abcdefghijklmnopqrstuvwxyz0123456789#?")
    shortest = 16

    def parts(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int], list[int]]:
        key = [self.ids[str(digit)] for digit in rng.integers(0, 10, 4)]
        return [self.end], [self.ids["#"], *key], [self.ids["?"]], key

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        return [self.ids[self.words[index]] for index in rng.integers(0, 26, length)]


@register_task("passkey_text")
class TextPasskey(DepthTask):
    """Passkey retrieval in plain English, for a language model with any tokenizer: a number of five digits, told once
    among sentences that repeat, asked for at the end. Paper: Mohtashami and Jaggi 2023, arXiv 2305.16300."""

    opening = "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it.\n"
    sentences = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"

    def __init__(self, tokenizer: Any = None) -> None:
        super().__init__(tokenizer)
        self.opening_ids, self.sentence_ids = self._encode(self.opening), self._encode(self.sentences)
        start = self.tokenizer.bos_token_id
        self.opening_ids = [*([] if start is None else [start]), *self.opening_ids]
        # another number may take more tokens: at most one for each of its 15 digits
        self.shortest = sum(map(len, self.parts(np.random.default_rng(0)))) + 15

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def parts(self, rng: np.random.Generator) -> tuple[list[int], list[int], list[int], list[int]]:
        key = int(rng.integers(10_000, 100_000))
        needle = self._encode(f"The pass key is {key}. Remember it. {key} is the pass key.\n")
        question = self._encode("What is the pass key? The pass key is")
        return self.opening_ids, needle, question, self._encode(f" {key}")

    def filler(self, rng: np.random.Generator, length: int) -> list[int]:
        return (self.sentence_ids * (length // len(self.sentence_ids) + 1))[:length]


class TaskRows(torch.utils.data.Dataset):
    """Rows of a task to train on or to validate with, each made when it is asked for, the same each time.

    Args:
        task: what to make.
        length: tokens of a row; shorter ones are padded.
        seed: another one, other rows.
        use: `TRAINING` or `VALIDATION`.
        num_rows: how many there are.
    """

    def __init__(self, task: Task, length: int, seed: int, use: int, num_rows: int) -> None:
        task.check_length("block_size", length)
        self.task, self.length, self.seed, self.use, self.num_rows = task, length, seed, use, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """→ `input_ids`, `attention_mask` and `labels`, −100 beside the answer, each (length,)."""
        tokens, answers = self.task.training_row(self.task.rng(self.seed, self.use, "", index), self.length)
        padding = self.task.tokenizer.pad_token_id
        ids, labels = np.full(self.length, self.task.end if padding is None else padding), np.full(self.length, -100)
        ids[: len(tokens)], labels[: len(tokens)] = tokens, np.where(answers, tokens, -100)
        mask = (np.arange(self.length) < len(tokens)).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def task_corpus(task: Task, length: int, seed: int, num_validation_rows: int | None = None) -> Corpus:
    """Rows of a task in place of a corpus: its splits are ready to train on."""
    sizes = (TRAINING, NUM_TRAINING_ROWS), (VALIDATION, num_validation_rows or NUM_VALIDATION_ROWS)
    splits = dict(zip(("train", "validation"), (TaskRows(task, length, seed, *size) for size in sizes)))
    return Corpus(f"task {task.name}", splits, task.fingerprint)


def evaluate_task(
    model: Any,
    task: Task,
    lengths: Sequence[int],
    num_rows: int = 100,
    tokens_per_batch: int = 8192,
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of a model by length and by kind of row.

    Args:
        model: a causal language model of transformers whose tokenizer is the task's.
        task: what to test.
        lengths: of the rows, in tokens; a row takes as many of them as the task can use.
        num_rows: test rows of each length and kind; the same for every model.
        tokens_per_batch: tokens of one forward, at least one row.
        seed: of the rows.

    Returns:
        "L" → `score`, `standard_error` over the rows, `loss` (nats per token of the answers), `num_rows` and, if there
        are several kinds, `kinds`: kind → the same.

    Raises:
        ValueError: for a length that is too short for the task or that the model cannot serve.
    """
    found: dict[str, Any] = {}
    with (
        evaluation_mode(model),
        tqdm(total=len(lengths) * len(task.kinds) * num_rows, desc=task.name, unit="row") as progress,
    ):
        for length in lengths:
            task.check_length("eval_lengths", length)
            by_kind = {}
            for kind in task.kinds:
                rows = [task.make_row(task.rng(seed, TEST, kind, index), length, kind) for index in range(num_rows)]
                scored = []
                size = max(1, tokens_per_batch // length)
                for first in range(0, num_rows, size):
                    scored += _score(model, task, rows[first : first + size])
                    progress.update(len(rows[first : first + size]))
                by_kind[kind] = scored
            summary = _summary([row for rows in by_kind.values() for row in rows])
            kinds = {kind: _summary(rows) for kind, rows in by_kind.items()}
            found[str(length)] = summary | ({"kinds": kinds} if len(kinds) > 1 else {})
    return found


def _score(model: Any, task: Task, rows: Sequence[tuple[list[int], list[bool]]]) -> list[tuple[float, float, int]]:
    """→ of each row the number of points, the points to be had and the mean loss of its answers."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, mask, answers = (torch.zeros(len(rows), width, dtype=torch.long) for _ in range(3))
    for index, (tokens, is_answer) in enumerate(rows):
        ids[index, : len(tokens)] = torch.tensor(tokens)
        mask[index, : len(tokens)] = 1
        answers[index, : len(tokens)] = torch.tensor(is_answer)
    logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    scored = []
    for index in range(len(rows)):
        places = answers[index].nonzero()[:, 0]
        own, targets = logits[index, places - 1].float().cpu(), ids[index, places]
        if not own.isfinite().all():
            raise ValueError(f"the model's logits are not finite at a length of {width} tokens.")
        right = own.argmax(-1) == targets
        points = (float(right.all()), 1.0) if task.whole_answers else (float(right.sum()), float(len(right)))
        scored.append((*points, float(torch.nn.functional.cross_entropy(own, targets))))
    return scored


def _summary(rows: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    points, possible, losses = (np.array(column, dtype=np.float64) for column in zip(*rows))
    score = points.sum() / possible.sum()
    # rows are what is drawn: a ratio of sums over them
    spread = ((points - score * possible) ** 2).sum() * len(rows) / max(len(rows) - 1, 1)
    error = math.sqrt(spread) / possible.sum()
    return {
        "score": float(score),
        "standard_error": float(error),
        "loss": float(losses.mean()),
        "num_rows": len(rows),
    }
