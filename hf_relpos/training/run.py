"""What one training run needs, put together and checked before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from transformers import TrainerCallback

from ..data.blocks import longest_document, make_blocks
from ..data.corpus import Corpus
from ..data.tokens import load_named_tokenizer, load_tokenizer, tokenize_split
from ..model.modeling_relpos import RelPosForCausalLM
from ..model_corpus import ModelCorpus, UsedCorpus
from ..model_loading import check_vocab_size
from ..tasks.arguments import DataArguments
from ..tasks.base import make_task, training_rows
from .arguments import RelPosTrainingArguments
from .checkpoints import checkpoint_state
from .model_setup import SavedModelArguments


@dataclass(frozen=True)
class TrainingData:
    """Blocks of a corpus or rows of a task, ready for the Trainer.

    Attributes:
        corpus: what `training.json` holds of the corpus or the task, and where it lies.
        tokenizer: the one that made the tokens.
        train, validation: data sets of `input_ids` (block_size,) and what goes with them.
        longest_document: the most tokens that attention can reach over in training; `None` where it is not bounded by
            documents, or not known.
    """

    corpus: UsedCorpus
    tokenizer: Any
    train: Any
    validation: Any
    longest_document: int | None = None


@dataclass(frozen=True)
class TrainingRun:
    """One run: the model before its first step, and all that decides how it is trained.

    Attributes:
        model: the model to train, its tokenizer is that of `data`.
        data: what to train and to validate on.
        model_args, data_args, args: what the command line was read into.
        checkpoint: the folder to resume from, or `None`.
        callbacks: of the Trainer, besides those of every run.
        changes: what was changed in a saved model, as `load_changed` returns it.
    """

    model: RelPosForCausalLM
    data: TrainingData
    model_args: SavedModelArguments
    data_args: DataArguments
    args: RelPosTrainingArguments
    checkpoint: str | None = None
    callbacks: Sequence[TrainerCallback] = ()
    changes: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def first_step(self) -> int:
        """The step of the checkpoint, or 0; kept, since the checkpoint may be gone at the end."""
        return checkpoint_state(self.checkpoint)["global_step"] if self.checkpoint else 0


def load_training_data(
    data_args: DataArguments,
    args: RelPosTrainingArguments,
    own: ModelCorpus,
    tokenizer: Any = None,
    vocab_size: int | None = None,
) -> TrainingData:
    """Loads a corpus or makes the rows of a task; one process after the other, so that the cache is filled once.

    Args:
        data_args: which corpus or task.
        args: `block_size`, `data_seed`.
        own: that of a saved model, which `data_args` were filled from.
        tokenizer: that of a saved model; by default the one that `data_args` names, or a new one.
        vocab_size: entries of a new tokenizer.

    Raises:
        ValueError: for data that is missing or too short, a tokenizer that does not fit it, or a corpus of a saved
            model that has changed.
    """
    with args.main_process_first(desc="corpus"):
        if data_args.task is not None:
            data = _task_data(data_args, args, tokenizer, vocab_size)
            own.check(data.corpus, data_args)
            return data
        corpus, used = own.load(data_args)
        tokenizer = tokenizer or load_tokenizer(data_args, corpus, vocab_size)
        train, validation = (
            _make_blocks(corpus, split, tokenizer, data_args, args.block_size) for split in ("train", "validation")
        )
        if data_args.max_eval_samples is not None:
            validation = validation.take(data_args.max_eval_samples)
        longest = None
        if not data_args.cross_document_attention:
            longest = longest_document(tokenize_split(corpus, "train", tokenizer, data_args))
        return TrainingData(used, tokenizer, train, validation, longest)


def _task_data(
    data_args: DataArguments, args: RelPosTrainingArguments, tokenizer: Any, vocab_size: int | None
) -> TrainingData:
    if tokenizer is None and data_args.tokenizer_name:
        tokenizer = load_named_tokenizer(data_args.tokenizer_name, vocab_size)
    task = make_task(data_args.task, tokenizer)
    check_vocab_size(task.tokenizer, vocab_size or len(task.tokenizer))
    rows = training_rows(task, args.block_size, args.data_seed or 0, data_args.max_eval_samples)
    return TrainingData(UsedCorpus.of_task(task.name, task.fingerprint), task.tokenizer, *rows)


def _make_blocks(corpus: Corpus, split: str, tokenizer: Any, data_args: DataArguments, block_size: int) -> Any:
    if split not in corpus.splits:
        raise ValueError(f"the corpus {corpus.name!r} must have a {split} split, got {list(corpus.splits)}.")
    tokenized = tokenize_split(corpus, split, tokenizer, data_args)
    return make_blocks(tokenized, block_size, data_args.cross_document_attention, split)
