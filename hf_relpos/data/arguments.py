"""Which text: the data flags of training and evaluation."""

from dataclasses import dataclass, field

from ..environment import check_at_least_1


@dataclass
class TextArguments:
    """Which text, and how it becomes blocks; the built-in corpus unless a data set or a file is given."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the Hub or a local folder that datasets.load_dataset takes."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A txt, jsonl, parquet or csv file to train on, also as gz, bz2, xz, zst, or a folder of one kind."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    document_separator: str = field(
        default="<|endoftext|>",
        metadata={"help": 'Text that stands between the documents of a file or a row; "" for one document each.'},
    )
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training documents to evaluate on if nothing else is given."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as it is needed. Needs --max_steps."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer to use instead of one trained on the corpus."}
    )
    cross_document_attention: bool = field(
        default=False, metadata={"help": "Let a block's tokens attend to the documents before theirs."}
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
