"""The record of a training run: model, data, recipe, command, cost and environment."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from ..environment import hardware, peak_memory_mib, place_name, versions
from ..model.configuration_relpos import RelPosConfig
from ..model_corpus import ModelCorpus
from ..model_loading import edited_fields
from ..results.training_record import given_flags, read_record
from ..scheme_files import import_flags
from .arguments import RelPosTrainingArguments
from .lora import num_plain_parameters
from .recipe import Recipe
from .run import TrainingRun


# what the record holds of the arguments and of the configuration
POSITION_FIELDS = ("pos_embedding_type", "pos_embedding_kwargs", "rope_parameters", "position_start_augmentation")
POSITION_FIELDS += ("position_gates", "position_sampling", "layer_types", "sliding_window", "train_length")
RECIPE_FIELDS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16")
CONFIG_FIELDS = (*RelPosConfig.__annotations__, "rope_parameters", "layer_types")
SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def training_record(run: TrainingRun, trainer: Trainer, seconds: float, recipe: Recipe) -> dict[str, Any]:
    """The record as `training.json` holds it, without the final losses and the facts of a base model.

    Steps, tokens and log are those of the weights that are saved: with `load_best_model_at_end` of the best checkpoint.

    Args:
        run: the run that `trainer` has done.
        trainer: after its last step.
        seconds: on the clock since the start or the resumption, evaluations included.
        recipe: of the run, with what resumptions changed.
    """
    args, config = run.args, trainer.model.config
    first_step, steps, last_step = run.first_step, saved_step(trainer), trainer.state.global_step
    per_step = tokens_per_step(args)
    seconds -= sum(
        entry["eval_runtime"]
        for entry in trainer.state.log_history
        if "eval_runtime" in entry and first_step < entry["step"]
    )
    numbers = {name: getattr(value := getattr(args, name), "value", value) for name in RECIPE_FIELDS}
    numbers |= {name: getattr(config, name) for name in ("vocab_size", "hidden_dropout", "attention_dropout")}
    flags = import_flags(config.pos_embedding_type) | given_flags(run.model_args, run.data_args, args)
    return {
        **{name: getattr(config, name, None) for name in POSITION_FIELDS},
        "seed": args.seed,
        "data_seed": args.data_seed,
        "shape": {name: getattr(config, name) for name in SHAPE_FIELDS},
        "config": {name: getattr(config, name, None) for name in CONFIG_FIELDS},
        "num_parameters": num_plain_parameters(trainer.model),
        "num_steps": steps,
        "num_processes": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "tokens_per_step": per_step,
        "num_tokens": steps * per_step,
        "passes": passes_over_corpus(run, steps),
        "block_size": args.block_size,
        **({"num_steps_trained": last_step, "load_best_model_at_end": True} if steps != last_step else {}),
        "recipe": numbers,
        "script": args.script,
        "flags": flags | ({} if args.fp16 else {"bf16": args.bf16}),
        "resumed_from_step": first_step,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(max(0, last_step - first_step) * per_step / max(seconds, 1e-9), 1),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "log": [
            {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
            for entry in trainer.state.log_history
            if ("loss" in entry or "eval_loss" in entry) and entry["step"] <= steps
        ],
        "corpus": run.data.corpus.record,
        "changes": run.changes or None,
        "resume": recipe.to_dict(),
        "versions": versions(),
        "hardware": hardware(),
    }


def tokens_per_step(args: RelPosTrainingArguments) -> int:
    """Of all processes and devices together."""
    batch_size = args.per_device_train_batch_size * max(1, args.n_gpu) * args.world_size
    return batch_size * args.gradient_accumulation_steps * args.block_size


def passes_over_corpus(run: TrainingRun, num_steps: int) -> float | None:
    """How often a run reads its corpus in so many steps; `None` for a stream."""
    blocks = run.data.train
    if not hasattr(blocks, "__len__"):
        return None
    return num_steps * tokens_per_step(run.args) / (len(blocks) * run.args.block_size)


def saved_step(trainer: Trainer) -> int:
    """The step of the weights that the model holds after training."""
    state = trainer.state
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint and state.best_global_step:
        return state.best_global_step
    return state.global_step


def mean_loss(trainer: Trainer, last_step: int) -> float | None:
    """The mean of the logged training losses up to a step, each weighted with its steps."""
    total = before = 0.0
    for entry in trainer.state.log_history:
        if "loss" in entry and entry["step"] <= last_step:
            total, before = total + entry["loss"] * (entry["step"] - before), entry["step"]
    return total / before if before else None


def base_facts(name: str, train_length: int | None) -> dict[str, Any]:
    """What the record of a run holds of the model that it continues: its name, length and how it was made."""
    base, base_name = read_record(name), place_name(name) if Path(name).exists() else name
    corpus = ModelCorpus.read(name).record or None
    made, edits = [], edited_fields(name)
    if "flags" in base and not edits:  # no command makes one that was edited
        made = [{"name": base_name, "script": base["script"], "flags": base["flags"], "corpus": corpus}]
    facts = {"base_model": base_name, "base_train_length": train_length, "base_corpus": corpus}
    if edits:
        return {**facts, "base_edits": edits, "history": []}
    return {**facts, "history": base.get("history", []) + made}


def repeats_rows(run: TrainingRun) -> bool:
    """Whether a run that continues a model begins with the rows of that model's own training, in the same order, of
    which less than one pass was read."""
    record = read_record(run.model_args.model_name_or_path)
    own = record.get("data_seed"), record.get("block_size"), (record.get("corpus") or {}).get("fingerprint")
    same = own == (run.args.data_seed, run.args.block_size, run.data.corpus.record.get("fingerprint"))
    return same and bool(record.get("num_steps")) and (record.get("passes") or 0) < 1
