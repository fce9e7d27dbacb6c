"""Training from scratch, and finetuning a saved model at another length or with another position scheme."""

import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from ..data.blocks import BlockCollator
from ..environment import check_room, write_json, writing
from ..file_reading import reading
from ..hub.model_card import origin_of
from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model_corpus import ModelCorpus
from ..processes import end_with_parent, only_owner
from ..results.training_record import TRAINING_RECORD, read_record
from ..scheme_check import check_imported
from ..tasks.arguments import DataArguments
from .arguments import DTYPES, FinetuningArguments, RelPosTrainingArguments
from .checkpoints import STATE, damage, find_checkpoint, load_weights, weights_damage
from .interrupt import InterruptCallback
from .lora import add_lora
from .model_arguments import ChangeArguments, ModelArguments
from .model_setup import extend_learned_positions, load_saved, new_config, new_model
from .output_stream import safe_output
from .progress import RunProgress
from .recipe import Recipe, check_recipe, differences, run_recipe
from .record import base_facts, mean_loss, saved_step, training_record
from .run import TrainingRun, load_training_data
from .scheme_change import describe_changes, load_changed
from .scheme_schedule import make_schedule
from .trainer import RelPosTrainer


def alone(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Decorator of `train` and `finetune`: no other process may work in the output folder meanwhile, and the processes
    of a launcher end with it."""

    @functools.wraps(function)
    def wrapped(
        model_args: Any, data_args: Any, args: TrainingArguments, callbacks: Sequence[TrainerCallback] = ()
    ) -> dict[str, Any]:
        _check_processes(args)
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun and accelerate launch, which live as long as their processes
            end_with_parent()
        with only_owner(args.output_dir) if args.process_index == 0 else nullcontext():
            return function(model_args, data_args, args, callbacks)

    return wrapped


@safe_output
@alone
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
        ValueError: for wrong flags, data or models, or if another process trains into that folder; nothing is written
            then.
        KeyboardInterrupt: after an interruption, when its checkpoint is saved.
    """
    checkpoint = find_checkpoint(args)
    if model_args.model_name_or_path:
        model, tokenizer = load_saved(model_args, data_args)
        check_imported(model.config)
        _check_length(model.config, args.block_size)
        own = ModelCorpus.read(model_args.model_name_or_path)
        data_args = own.fill(data_args)
        data = load_training_data(data_args, args, own, tokenizer)
    else:
        config = new_config(model_args, args.block_size)
        check_imported(config)
        _check_length(config, args.block_size)
        own = ModelCorpus(None)
        data_args = own.fill(data_args)
        data = load_training_data(data_args, args, own, vocab_size=model_args.vocab_size)
        tokens = {name: getattr(data.tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
        config = RelPosConfig.from_dict({**config.to_dict(), "vocab_size": len(data.tokenizer), **tokens})
        model = new_model(config, args.seed, model_args.attn_implementation)
    return _fit(TrainingRun(model, data, model_args, data_args, args, checkpoint, callbacks))


@safe_output
@alone
def finetune(
    model_args: ChangeArguments,
    data_args: DataArguments,
    args: FinetuningArguments,
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, Any]:
    """Continues with a saved model at `args.block_size`, with the changes that are asked for; otherwise as `train`."""
    checkpoint = find_checkpoint(args)
    if not model_args.model_name_or_path:
        raise ValueError("--model_name_or_path is required.")
    model, tokenizer, changes = load_changed(model_args, data_args, args.block_size, args.seed)
    check_imported(model.config)
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
    own = ModelCorpus.read(model_args.model_name_or_path)
    data_args = own.fill(data_args)
    data = load_training_data(data_args, args, own, tokenizer)
    return _fit(TrainingRun(model, data, model_args, data_args, args, checkpoint, callbacks, changes))


def _fit(run: TrainingRun) -> dict[str, Any]:
    """Trains, saves and evaluates the model of a run; → its record."""
    model, args = run.model, run.args
    _check_batch(run.data.train, args)
    if args.push_to_hub:
        origin_of(model.config.to_dict())
    base = {}
    if run.model_args.model_name_or_path:
        base = base_facts(run.model_args.model_name_or_path, model.config.train_length)
    _set_lengths(model.config, args)
    save_dtype, schedule = _prepare_weights(model, args), make_schedule(run)
    run.data.tokenizer.model_max_length = model.config.max_position_embeddings
    recipe, changed = run_recipe(run), {}
    finished = _finished(run, recipe)
    if finished:
        if args.process_index == 0:
            trained = f"the model after step {finished['num_steps']} on {finished['corpus']['name']}"
            print(f"finished: {args.output_dir!r} holds {trained}; nothing to do")
        return finished
    if schedule:
        schedule.apply(run.first_step)
    if run.checkpoint:
        _check_checkpoint(run.checkpoint, model.config)
        changed = check_recipe(run, recipe)
    model.skip_logits = True
    interrupt = InterruptCallback()
    trainer = _make_trainer(run, [interrupt, *([schedule] if schedule else [])])
    # the bar of transformers tells no loss, and leaves thousands of copies of itself in a file
    is_replaced = trainer.pop_callback(ProgressCallback) is not None
    trainer.add_callback(RunProgress(run, lambda: float(trainer.step_loss[1]), only_time=not is_replaced))
    trainer.recipe, trainer.changed, trainer.corpus = recipe, changed, run.data.corpus
    trainer.save_dtype = save_dtype
    check_before_training(run, trainer, base)
    start = time.perf_counter()

    def make_record(training_loss: float | None) -> dict[str, Any]:
        record = training_record(run, trainer, time.perf_counter() - start, recipe)
        return record | {"train_loss": training_loss, "validation_loss": _last_evaluation(trainer), **base}

    trainer.make_record = lambda: make_record(mean_loss(trainer, trainer.state.global_step))
    try:
        with writing("`output_dir`", args.output_dir):
            training_loss = _train(run, trainer)
            if interrupt.stopped:
                if trainer.is_world_process_zero():
                    step = trainer.state.global_step
                    print(f"interrupted after step {step}; resume with --resume_from_checkpoint last")
                raise KeyboardInterrupt(f"after step {trainer.state.global_step}")
            _save_model(trainer)
            if _last_evaluation(trainer) is None:
                trainer.evaluate()
            record = make_record(training_loss)
            _save_record(trainer, record)
        if args.process_index == 0:
            print(_closing_line(record, args.output_dir))
    finally:
        interrupt.restore()
    return record


def _closing_line(record: dict[str, Any], folder: str) -> str:
    """What was saved where, and on which text it was trained and scored."""
    name, loss = record["corpus"]["name"], record["validation_loss"]
    done = f"{record['num_steps']} steps on {name}, split train" if record["num_steps"] else "no step"
    return f"saved {folder}: {done}" + ("" if loss is None else f"; loss {loss:.4f} on {name}, split validation")


def _train(run: TrainingRun, trainer: RelPosTrainer) -> float | None:
    """Takes the steps that are left; → the mean loss of these, or of all if none is left."""
    args = run.args
    if args.max_steps == 0:  # to the Trainer it means all of `num_train_epochs`
        return None
    if run.checkpoint and run.first_step >= (steps := _num_steps(run, trainer)):
        if run.first_step > steps:
            raise ValueError(f"`max_steps` {steps} lies before step {run.first_step} of {run.checkpoint!r}.")
        trainer.state = TrainerState.load_from_json(str(Path(run.checkpoint) / STATE))
        step, weights = saved_step(trainer), run.checkpoint
        if step != run.first_step:  # as `load_best_model_at_end` chose
            weights = str(Path(run.checkpoint).with_name(f"checkpoint-{step}"))
            reason = damage(weights)
            if reason:
                raise ValueError(f"the best checkpoint {weights!r} is damaged: {reason}.")
        load_weights(run.model, weights)
        run.model.to(args.device)
        return mean_loss(trainer, step)
    loss = trainer.train(resume_from_checkpoint=run.checkpoint).training_loss
    step = saved_step(trainer)
    return loss if step == trainer.state.global_step else mean_loss(trainer, step)


def _num_steps(run: TrainingRun, trainer: RelPosTrainer) -> int:
    """The steps that the run takes in all."""
    args = run.args
    if args.max_steps > 0:
        return args.max_steps
    per_epoch = max(1, math.ceil(len(trainer.get_train_dataloader()) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def _finished(run: TrainingRun, recipe: Recipe) -> dict[str, Any] | None:
    """The record of a run that is resumed though it has come to its end with the same recipe."""
    args, folder = run.args, Path(run.args.output_dir)
    if args.resume_from_checkpoint is None or str(args.resume_from_checkpoint).lower() == "false":
        return None
    if not (folder / TRAINING_RECORD).is_file():
        return None
    try:
        record = read_record(args.output_dir)
    except ValueError as error:
        if run.checkpoint is None:
            raise
        if args.process_index == 0:
            print(f"damaged: {error} The run goes on from {run.checkpoint}")
        return None
    differing = differences(record.get("resume", {}).get("values", {}), recipe.values, run)
    if not differing:
        if reason := weights_damage(folder):
            if run.checkpoint is None:
                raise ValueError(f"{args.output_dir!r} holds a finished run, and it is damaged: {reason}.")
            if args.process_index == 0:
                print(f"damaged: {folder}: {reason}; the model of {run.checkpoint} takes its place")
            return None
        _check_checkpoint(args.output_dir, run.model.config)
        return record
    if run.checkpoint is None:
        listed = "; ".join(f"`{name}` was {theirs!r}, got {ours!r}" for name, (theirs, ours) in differing.items())
        raise ValueError(f"{args.output_dir!r} holds a finished run and no whole checkpoint to go on from: {listed}.")
    return None


def _set_lengths(config: RelPosConfig, args: RelPosTrainingArguments) -> None:
    """Puts the lengths of a run into the configuration of its model, in place, and validates it."""
    if args.max_steps != 0:  # shorter blocks recalibrate, they do not make a model forget its length
        config.train_length = max(args.block_size, config.train_length or 0)
    config.max_position_embeddings = max(config.max_position_embeddings, args.block_size)
    RelPosConfig.from_dict(config.to_dict())  # fields are checked when a configuration is made, not when they are set


def _prepare_weights(model: RelPosForCausalLM, args: RelPosTrainingArguments) -> torch.dtype:
    """Makes the weights fp32, in place, and adds LoRA where it is asked for; → the dtype to save them in."""
    dtype = DTYPES[args.save_dtype] if args.save_dtype else model.dtype
    if model.dtype in (torch.bfloat16, torch.float16):
        model.float()
        model.config.dtype = model.dtype
    if getattr(args, "lora_rank", None):
        add_lora(model, args.lora_rank, args.lora_alpha, args.seed)
    return dtype


def _make_trainer(run: TrainingRun, callbacks: list[TrainerCallback]) -> RelPosTrainer:
    try:
        return RelPosTrainer(
            model=run.model,
            args=run.args,
            train_dataset=run.data.train,
            eval_dataset=run.data.validation,
            processing_class=run.data.tokenizer,
            data_collator=BlockCollator(),
            callbacks=[*callbacks, *run.callbacks],
        )
    except RuntimeError as error:
        if "requires" in str(error):  # a tracker that is not installed
            raise ValueError(f"`report_to` {run.args.report_to} cannot be used: {error}") from error
        raise


def _save_model(trainer: RelPosTrainer) -> None:
    """Writes model and tokenizer to the output folder; a record of earlier weights goes first."""
    trainer.check_finite()
    trainer.model.config.use_cache = True  # the Trainer switched it off
    if trainer.is_world_process_zero():
        (Path(trainer.args.output_dir) / TRAINING_RECORD).unlink(missing_ok=True)
    trainer.save_model(_internal_call=True)


def _save_record(trainer: RelPosTrainer, record: dict[str, Any]) -> None:
    """Writes record and card to the output folder, and publishes it with `push_to_hub`."""
    if trainer.is_world_process_zero():
        # last: a folder with a record is complete
        write_json(Path(trainer.args.output_dir) / TRAINING_RECORD, record)
    if trainer.args.push_to_hub:
        trainer.push_to_hub()  # with the card
    else:
        trainer.create_model_card()


def _last_evaluation(trainer: Trainer) -> float | None:
    """The validation loss of the weights that the model holds, if it was computed."""
    history, step = trainer.state.log_history, saved_step(trainer)
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry and entry["step"] == step]
    return losses[-1] if losses else None


# --- checks before anything is written


def check_before_training(run: TrainingRun, trainer: RelPosTrainer, base: dict[str, Any]) -> None:
    """Does what could fail after the last step: makes the record, writes to the output folder, looks for room in it.

    Raises:
        ValueError: if the record cannot be made, or there is no room for a checkpoint.
        OSError: if the output folder cannot be written.
    """
    json.dumps({**training_record(run, trainer, 1.0, trainer.recipe), **base}, allow_nan=False)
    if not run.args.should_save:
        return
    num_bytes = sum(weight.nbytes for weight in run.model.parameters()) * (1 if run.args.max_steps == 0 else 3)
    check_room("output_dir", run.args.output_dir, num_bytes, "a checkpoint")


def _check_checkpoint(checkpoint: str, config: RelPosConfig) -> None:
    with reading(f"the configuration of {checkpoint!r} cannot be read"):
        saved = RelPosConfig.from_pretrained(checkpoint)
    for name in (*RelPosConfig.__annotations__, "rope_parameters", "layer_types"):
        theirs, ours = getattr(saved, name, None), getattr(config, name, None)
        if theirs != ours and name != "use_cache":
            raise ValueError(f"`{name}` of the checkpoint {checkpoint!r} is {theirs!r}, got {ours!r}.")


def _check_length(config: RelPosConfig, block_size: int) -> None:
    if config.max_positions is not None and block_size > config.max_positions:
        raise ValueError(
            f"`block_size` must be at most {config.max_positions}, the rows of the learned table "
            f"(`max_position_embeddings`), got {block_size}; hf-relpos finetune --extend_learned_positions true "
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
