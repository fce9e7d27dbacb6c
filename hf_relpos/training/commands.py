"""`hf-relpos train` and `hf-relpos finetune`: their flags, and what they say at the end. The rest is imported when the
flags were read, so that `--help` does not wait for it."""

from collections.abc import Callable
from typing import Any

from ..cli import command, parse_arguments, say_next
from ..messages import say_command, this_command
from ..tasks.arguments import DataArguments
from .arguments import FinetuningArguments, RelPosTrainingArguments
from .model_arguments import ChangeArguments, ModelArguments
from .output_stream import safe_output


TRAIN_DESCRIPTION = """\
Trains a model of the family from scratch, or continues with a saved one at the same length.

hf-relpos train --train_file my_texts/ --pos_embedding_type alibi --max_steps 300 --output_dir output/alibi
"""
FINETUNE_DESCRIPTION = """\
Continues with a saved model of the family at another length or with another position scheme.

hf-relpos finetune --model_name_or_path output/alibi --block_size 512 --max_steps 50 --output_dir output/512
"""
RUN_FLAGS = ("learning_rate", "per_device_train_batch_size", "seed", "resume_from_checkpoint")
TRAIN_FLAGS = ("output_dir", "pos_embedding_type", "train_file", "model_size", "block_size", "max_steps")
FINETUNE_FLAGS = (
    "model_name_or_path",
    "output_dir",
    "block_size",
    "pos_embedding_type",
    "rope_parameters",
    "max_steps",
)


@command
def train_main() -> None:
    """The command line of scripts/train.py."""
    types = (ModelArguments, DataArguments, RelPosTrainingArguments)
    given = parse_arguments(types, TRAIN_DESCRIPTION, usual=(*TRAIN_FLAGS, *RUN_FLAGS), required=TRAIN_FLAGS[:1])
    from .train import train

    _run(train, given)


@command
def finetune_main() -> None:
    """The command line of scripts/finetune.py."""
    types = (ChangeArguments, DataArguments, FinetuningArguments)
    usual = (*FINETUNE_FLAGS, *RUN_FLAGS)
    given = parse_arguments(types, FINETUNE_DESCRIPTION, usual=usual, required=FINETUNE_FLAGS[:2])
    from .train import finetune

    _run(finetune, given)


def _run(function: Callable[..., dict[str, Any]], given: tuple[Any, ...]) -> None:
    """Trains, and says how to go on, also after an interruption that left a checkpoint."""
    try:
        function(*given)
    except KeyboardInterrupt as stopped:
        if stopped.args and given[-1].world_size == 1:  # of several processes the launcher's command is not known here
            again = this_command(["--resume_from_checkpoint"], "--resume_from_checkpoint", "last")
            _say(lambda: say_command(again))
        raise
    folder = given[-1].output_dir
    _say(lambda: say_next("evaluate", model_name_or_path=folder, output_dir=f"{folder.rstrip('/')}/evaluation"))


@safe_output
def _say(function: Callable[[], None]) -> None:
    function()
