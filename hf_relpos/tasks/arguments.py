"""Which text or which synthetic task: the data flags of training and evaluation."""

from dataclasses import dataclass, field

from ..data.arguments import READING_DEFAULTS, SOURCE_FLAGS, TextArguments
from .base import TASKS


# which text is read and how; how attention goes over documents belongs to a model, whatever it reads
READING = {"dataset_config_name", "held_out_ends", *READING_DEFAULTS} - {"cross_document_attention"}


@dataclass
class DataArguments(TextArguments):
    """Which text, and how it becomes blocks, or which synthetic task; that of a saved model where none is named, else
    the built-in corpus."""

    task: str | None = field(default=None, metadata={"help": f"A synthetic task instead of text: {', '.join(TASKS)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in (*SOURCE_FLAGS, *READING):
            value = getattr(self, name)
            if self.task and value and value != READING_DEFAULTS.get(name):
                raise ValueError(f"`task` and `{name}` exclude each other, got both.")
