"""Synthetic tasks: rows whose answer is known, made at any length, so that a model trained short can be tested long.

A task is one small class under `register_task`. Its rows are token ids and a mask of the tokens that are the answer;
only those are trained and scored.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..data.cache import digest
from ..special_tokens import END, PAD, SPECIAL_TOKENS, START, document_end, document_start


if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


TASKS: dict[str, type["Task"]] = {}
# rows before any is repeated: a model in training sees new ones all the time
NUM_TRAINING_ROWS, NUM_VALIDATION_ROWS = 2**20, 256
TRAINING, VALIDATION, TEST = range(3)  # rows of the same index and seed differ by these


def register_task(name: str) -> Callable[[type["Task"]], type["Task"]]:
    """Class decorator: registers a task under `name`."""

    def register(cls: type["Task"]) -> type["Task"]:
        cls.name = name
        TASKS[name] = cls
        return cls

    return register


def make_task(name: str, tokenizer: Any = None) -> "Task":
    """The task of that name, for a model with that tokenizer; by default a tokenizer of the task's words is made.

    Raises:
        ValueError: for an unknown name, or a tokenizer that lacks words of the task.
    """
    check_task(name)
    return TASKS[name](tokenizer)


def check_task(name: str) -> None:
    """Raises `ValueError` for a name that no task has."""
    if name not in TASKS:
        raise ValueError(f"`task` must be one of {list(TASKS)}, got {name!r}.")


class Task:
    """What all tasks share.

    Attributes:
        name: what `--task` takes.
        score_name: what is scored.
        words: the task's vocabulary, in the order of the ids after the special tokens; empty for a task in plain text,
            which takes any tokenizer.
        kinds: kinds of test rows, each scored separately; training rows are like the first.
        whole_answers: whether a row is right or wrong as a whole; otherwise each token of its answers is scored.
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
        self.start, self.end = document_start(self.tokenizer), document_end(self.tokenizer)
        vocabulary = self.tokenizer.get_vocab()
        missing = [word for word in self.words if word not in vocabulary]
        if missing:
            raise ValueError(f"`task` {self.name!r} is for models with its words: the tokenizer lacks {missing[0]!r}.")
        self.ids = {word: vocabulary[word] for word in self.words}

    def make_tokenizer(self) -> "PreTrainedTokenizerFast":
        """A tokenizer of the task's words, separated by spaces."""
        import tokenizers  # the names of the tasks stand in --help, which does not wait for these libraries
        from transformers import PreTrainedTokenizerFast

        if not self.words:
            raise ValueError(f"`tokenizer_name` or a saved model is needed: `task` {self.name!r} is in plain text.")
        vocabulary = {word: index for index, word in enumerate((END, PAD, START, *self.words))}
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=PAD))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)

    @property
    def fingerprint(self) -> str:
        """A hash that changes when the rows change."""
        return digest("task", self.name, [self.make_row(self.rng(0, TEST, kind, 0), 100, kind) for kind in self.kinds])

    @staticmethod
    def rng(seed: int, use: int, kind: str, index: int) -> np.random.Generator:
        """A random generator for one row, independent of those of other rows."""
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


class TaskRows:
    """Rows of a task to train on or to validate with, each made when it is read, the same every time.

    Args:
        task: what to make.
        length: tokens of a row; shorter ones are padded.
        seed: each seed gives other rows.
        use: `TRAINING` or `VALIDATION`.
        num_rows: how many there are.
    """

    def __init__(self, task: Task, length: int, seed: int, use: int, num_rows: int) -> None:
        task.check_length("block_size", length)
        self.task, self.length, self.seed, self.use, self.num_rows = task, length, seed, use, num_rows

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """→ `input_ids`, `attention_mask` and `labels`, −100 outside the answer, each (length,)."""
        tokens, answers = self.task.training_row(self.task.rng(self.seed, self.use, "", index), self.length)
        padding = self.task.tokenizer.pad_token_id
        ids, labels = np.full(self.length, self.task.end if padding is None else padding), np.full(self.length, -100)
        ids[: len(tokens)], labels[: len(tokens)] = tokens, np.where(answers, tokens, -100)
        mask = (np.arange(self.length) < len(tokens)).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def training_rows(
    task: Task, length: int, seed: int, num_validation_rows: int | None = None
) -> tuple[TaskRows, TaskRows]:
    """→ rows of `length` tokens to train on, and `num_validation_rows` others to validate with, 256 by default."""
    return (
        TaskRows(task, length, seed, TRAINING, NUM_TRAINING_ROWS),
        TaskRows(task, length, seed, VALIDATION, num_validation_rows or NUM_VALIDATION_ROWS),
    )
