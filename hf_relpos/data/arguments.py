"""Which text: the data flags of training and evaluation."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from ..environment import check_at_least_1


BUILT_IN = "sotu"  # the name of the built-in corpus
# the flags that say where text is, and what those that say how it is read mean where nothing else tells
FILE_FLAGS = ("train_file", "validation_file", "test_file")
SOURCE_FLAGS = ("dataset_name", *FILE_FLAGS)
READING_DEFAULTS = {
    "text_column": "text",
    "document_separator": "<|endoftext|>",
    "validation_split_percentage": 5,
    "streaming": False,
    "cross_document_attention": False,
}


@dataclass
class TextArguments:
    """Which text, and how it becomes blocks; that of a saved model where none is named, else the built-in corpus."""

    about: ClassVar[str] = "the text"
    # of a copy that was filled from the record of a model: the flags that were named
    given: ClassVar[dict[str, Any] | None] = None

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "A data set of the Hub or a local folder that datasets.load_dataset takes; by default "
            "--train_file, the saved model's text or the built-in one."
        },
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Text to train on: a txt, jsonl, parquet or csv file, or any other of plain text such as md, py or "
            "html, also as gz, bz2, xz, zst; or a folder of one kind. By default the saved model's text, or the "
            "built-in one."
        },
    )
    validation_file: str | None = field(
        default=None,
        metadata={
            "help": "Text to evaluate on while training, as --train_file takes it; some training documents by default."
        },
    )
    test_file: str | None = field(
        default=None,
        metadata={"help": "Text that evaluation reads instead of the validation text, which it reads by default."},
    )
    text_column: str | None = field(default=None, metadata={"help": "The column that holds the text; text by default."})
    document_separator: str | None = field(
        default=None,
        metadata={
            "help": "Text that stands between the documents of a file or a row, <|endoftext|> by default; "
            '"" for one document each.'
        },
    )
    held_out_ends: bool | None = field(
        default=None,
        metadata={
            "help": "The text to evaluate on is the end of documents whose beginnings are in --train_file: results "
            "then claim nothing about new documents."
        },
    )
    validation_split_percentage: int | None = field(
        default=None,
        metadata={"help": "Share of the training documents to evaluate on if nothing else is given; 5 by default."},
    )
    streaming: bool | None = field(
        default=None,
        metadata={"help": "Read the data as it is needed; in training with --max_steps. false by default."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "A tokenizer to use; by default the saved model's, or one that is trained on the corpus."},
    )
    cross_document_attention: bool | None = field(
        default=None, metadata={"help": "Let a block's tokens attend to the documents before theirs; false by default."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Blocks of the validation split to evaluate on while training; all by default."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes for tokenising; by default one that uses all cores."}
    )

    def __post_init__(self) -> None:
        for name in ("max_eval_samples", "preprocessing_num_workers"):
            check_at_least_1(name, getattr(self, name))

    def filled(self) -> Self:
        """→ a copy in which the flags that say how text is read have their defaults where they were not given."""
        unset = {name: value for name, value in READING_DEFAULTS.items() if getattr(self, name) is None}
        return replace(self, **unset)
