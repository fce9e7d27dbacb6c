"""Which text or which synthetic task: the data flags of training and evaluation."""

from dataclasses import dataclass, field

from ..data.arguments import SOURCE_FLAGS, TextArguments
from .base import TASKS


@dataclass
class DataArguments(TextArguments):
    """Which text, and how it becomes blocks, or which synthetic task; that of a saved model where none is named, else
    the built-in corpus."""

    task: str | None = field(default=None, metadata={"help": f"A synthetic task instead of text: {', '.join(TASKS)}."})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in SOURCE_FLAGS:
            if self.task and getattr(self, name):
                raise ValueError(f"`task` and `{name}` exclude each other, got both.")
