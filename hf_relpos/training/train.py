"""Training from scratch, and finetuning a saved model at another length or with another position scheme."""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from ..cli import command, parse_arguments
from ..data.blocks import BlockCollator
from ..environment import write_json
from ..model.configuration_relpos import RelPosConfig
from ..results.training_record import TRAINING_RECORD
from ..tasks.arguments import DataArguments
from .arguments import FinetuningArguments, RelPosTrainingArguments
from .interrupt import InterruptCallback
from .model_setup import ModelArguments, extend_learned_positions, load_saved, new_config, new_model
from .record import base_facts, training_record
from .run import TrainingRun, load_training_data
from .scheme_change import ChangeArguments, describe_changes, load_changed
from .trainer import RelPosTrainer


TRAIN_DESCRIPTION = """\
Trains a model of the family from scratch, or continues with a saved one at the same length.

hf-relpos train --pos_embedding_type alibi --output_dir output/alibi
"""
FINETUNE_DESCRIPTION = """\
Continues with a saved model of the family at another length or with another position scheme.

hf-relpos finetune --model_name_or_path output/alibi --block_size 512 --output_dir output/512
"""


@command
def train_main() -> None:
    """The command line of scripts/train.py."""
    train(*parse_arguments((ModelArguments, DataArguments, RelPosTrainingArguments), TRAIN_DESCRIPTION))


@command
def finetune_main() -> None:
    """The command line of scripts/finetune.py."""
    finetune(*parse_arguments((ChangeArguments, DataArguments, FinetuningArguments), FINETUNE_DESCRIPTION))


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: RelPosTrainingArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Trains a model and saves it to `args.output_dir` with its tokenizer and `training.json`.

    Args:
        model_args, data_args, args: what scripts/train.py takes.
        callbacks: further ones for the Trainer.

    Returns:
        the record of the run, as in `training.json`.

    Raises:
        ValueError: for wrong flags, data or models; nothing is written then.
        KeyboardInterrupt: after an interruption, when its checkpoint is saved.
    """
    _check_processes(args)
    checkpoint = find_checkpoint(args)
    if model_args.model_name_or_path:
        model, tokenizer = load_saved(model_args, data_args)
        _check_length(model.config, args.block_size)
        data = load_training_data(data_args, args, tokenizer)
    else:
        config = new_config(model_args, args.block_size)
        _check_length(config, args.block_size)
        data = load_training_data(data_args, args, vocab_size=model_args.vocab_size)
        tokens = {name: getattr(data.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = RelPosConfig.from_dict({**config.to_dict(), "vocab_size": len(data.tokenizer), **tokens})
        model = new_model(config, args.seed, model_args.attn_implementation)
    return _fit(TrainingRun(model, data, model_args, data_args, args, checkpoint, callbacks))


def finetune(
    model_args: ChangeArguments,
    data_args: DataArguments,
    args: FinetuningArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Continues with a saved model at `args.block_size`, with the changes that are asked for; otherwise as `train`."""
    _check_processes(args)
    checkpoint = find_checkpoint(args)
    if not model_args.model_name_or_path:
        raise ValueError("--model_name_or_path is required.")
    model, tokenizer, changes = load_changed(model_args, data_args, args.block_size, args.seed)
    limit = model.config.max_positions
    if args.extend_learned_positions:
        if limit is None:
            raise ValueError(
                "`extend_learned_positions` is for schemes with a learned table, "
                f"got {model.config.pos_embedding_type!r}."
            )
        extend_learned_positions(model, max(limit, args.block_size))
    if changes and args.process_index == 0:
        print(describe_changes(changes))
    _check_length(model.config, args.block_size)
    data = load_training_data(data_args, args, tokenizer)
    return _fit(TrainingRun(model, data, model_args, data_args, args, checkpoint, callbacks, changes))


def _fit(run: TrainingRun) -> dict[str, Any]:
    """Trains, evaluates and saves the model of a run; → its record."""
    model, args = run.model, run.args
    _check_batch(run.data.train, args)
    base = {}
    if run.model_args.model_name_or_path:
        base = base_facts(run.model_args.model_name_or_path, model.config.train_length)
    _set_lengths(model.config, args)
    if run.checkpoint:
        _check_checkpoint(run.checkpoint, model.config)
    model.skip_logits = True
    interrupt = InterruptCallback()
    trainer = _make_trainer(run, interrupt)
    start = time.perf_counter()
    # to the Trainer `max_steps` 0 means all of `num_train_epochs`
    training_loss = trainer.train(resume_from_checkpoint=run.checkpoint).training_loss if args.max_steps else None
    if interrupt.stopped:
        if trainer.is_world_process_zero():
            step = trainer.state.global_step
            print(f"interrupted after step {step}; resume with --resume_from_checkpoint last")
        raise KeyboardInterrupt
    record = training_record(run, trainer, time.perf_counter() - start)
    if _last_evaluation(trainer) is None:
        trainer.evaluate()
    record |= {"train_loss": training_loss, "validation_loss": _last_evaluation(trainer), **base}
    _save(trainer, record)
    return record


def _set_lengths(config: RelPosConfig, args: RelPosTrainingArguments) -> None:
    """Puts the lengths of a run into the configuration of its model, in place, and validates it."""
    if args.max_steps != 0:
        config.train_length = args.block_size
    config.max_position_embeddings = max(config.max_position_embeddings, args.block_size)
    RelPosConfig.from_dict(config.to_dict())  # fields are checked when a configuration is made, not when they are set


def _make_trainer(run: TrainingRun, interrupt: InterruptCallback) -> RelPosTrainer:
    try:
        return RelPosTrainer(
            model=run.model,
            args=run.args,
            train_dataset=run.data.train,
            eval_dataset=run.data.validation,
            processing_class=run.data.tokenizer,
            data_collator=BlockCollator(),
            callbacks=[interrupt, *run.callbacks],
        )
    except RuntimeError as error:
        if "requires" in str(error):  # a tracker that is not installed
            raise ValueError(f"`report_to` {run.args.report_to} cannot be used: {error}") from error
        raise


def _save(trainer: RelPosTrainer, record: dict[str, Any]) -> None:
    """Writes model, tokenizer, record and card to the output folder, and publishes them with `push_to_hub`."""
    trainer.model.config.use_cache = True  # the Trainer switched it off
    trainer.save_model(_internal_call=True)
    if trainer.is_world_process_zero():
        # last: a folder with a record is complete
        write_json(Path(trainer.args.output_dir) / TRAINING_RECORD, record)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # with the card
    else:
        trainer.create_model_card()


def _last_evaluation(trainer: Trainer) -> float | None:
    """The validation loss after the last step, if it was computed."""
    state = trainer.state
    losses = [
        entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry and entry["step"] == state.global_step
    ]
    return losses[-1] if losses else None


# --- checks before anything is written


def find_checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to resume from: `--resume_from_checkpoint last` is the newest in the output folder.

    Raises:
        ValueError: if there is none, or if the output folder holds a run and none is to be resumed.
    """
    folder, wanted = Path(args.output_dir), args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        runs = [path.name for path in folder.glob("*") if path.name.startswith("checkpoint-") or path.suffix == ".json"]
        if runs:
            raise ValueError(
                f"`output_dir` {args.output_dir!r} already holds a run ({sorted(runs)[0]}): choose another, or "
                "resume with --resume_from_checkpoint last."
            )
        return None
    if str(wanted).lower() in ("last", "true"):
        # one that was being written when the run was killed is not whole: the state is saved last
        whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
        if not whole:
            raise ValueError(f"`resume_from_checkpoint`: {args.output_dir!r} holds no checkpoint.")
        wanted = max(whole, key=lambda path: int(path.name.rpartition("-")[2]))
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"`resume_from_checkpoint` {str(wanted)!r} is not a checkpoint of a run.")
    return str(wanted)


def _check_checkpoint(checkpoint: str, config: RelPosConfig) -> None:
    saved = RelPosConfig.from_pretrained(checkpoint)
    for name in (*RelPosConfig.__annotations__, "rope_parameters", "layer_types"):
        theirs, ours = getattr(saved, name, None), getattr(config, name, None)
        if theirs != ours and name != "use_cache":
            raise ValueError(f"`{name}` of the checkpoint {checkpoint!r} is {theirs!r}, got {ours!r}.")


def _check_length(config: RelPosConfig, block_size: int) -> None:
    if config.max_positions is not None and block_size > config.max_positions:
        raise ValueError(
            f"`block_size` must be at most {config.max_positions}, the rows of the learned table "
            f"(`max_position_embeddings`), got {block_size}; scripts/finetune.py --extend_learned_positions true "
            "lengthens it."
        )
    for name in ("position_start_augmentation", "position_sampling"):
        if getattr(config, name) and block_size > config.max_position_embeddings:
            raise ValueError(
                f"`block_size` must be at most `max_position_embeddings`={config.max_position_embeddings} with "
                f"`{name}`, got {block_size}."
            )


def _check_batch(blocks: Any, args: RelPosTrainingArguments) -> None:
    per_step = args.per_device_train_batch_size * max(1, args.n_gpu) * args.world_size
    if hasattr(blocks, "__len__") and len(blocks) < per_step:
        raise ValueError(
            f"`per_device_train_batch_size`: a step needs {per_step} blocks, the training split gives {len(blocks)} of "
            f"{args.block_size} tokens."
        )


def _check_processes(args: TrainingArguments) -> None:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != args.world_size:
        raise ValueError(f"{launched} processes were launched but {args.world_size} take part; on CPUs add --use_cpu.")
