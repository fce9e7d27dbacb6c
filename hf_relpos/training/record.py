"""The record of a training run: what was trained on what, how, by which command, and what it cost."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments
from transformers.utils import cached_file

from ..data.corpus import Corpus
from ..environment import hardware, peak_memory_mib, versions


TRAINING_RECORD = "training.json"
# what the record holds of the arguments and of the configuration
RECIPE_FIELDS = ("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay", "max_grad_norm", "bf16")
SHAPE_FIELDS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
# flags that say where a run goes and who is told of it, and change nothing in it
PRIVATE = (
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "project",
    "push_to_hub",
    "resume_from_checkpoint",
    "include_num_input_tokens_seen",
)
# what changes nothing in the result
COSMETIC = {
    "attn_implementation",
    "disable_tqdm",
    "logging_steps",
    "preprocessing_num_workers",
    "report_to",
    "save_steps",
    "save_total_limit",
}


def given_flags(*arguments: Any) -> dict[str, Any]:
    """The flags that differ from their defaults, as a command line would have them, without paths and secrets.

    Args:
        arguments: instances of the scripts' dataclasses; one of `RelPosTrainingArguments` knows what it was given.
    """
    flags = {}
    for instance in arguments:
        given = getattr(instance, "given", None) or non_default_fields(instance)
        for name, value in given.items():
            if name in PRIVATE or name in COSMETIC or name.startswith(("hub_", "trackio_")) or name.endswith("_token"):
                continue
            if isinstance(value, str) and Path(value).exists():
                value = Path(value).name  # where a file lies is nobody's business
            flags[name] = value.value if isinstance(value, Enum) else value
    return flags


def non_default_fields(instance: Any) -> dict[str, Any]:
    """Field name → value, for the fields of a dataclass instance whose value is not the default."""
    found = {}
    for each in fields(instance):
        default = each.default_factory() if callable(each.default_factory) else each.default
        value = getattr(instance, each.name, default)
        if each.init and value is not None and value != default:
            found[each.name] = value
    return found


def command_line(script: str, flags: dict[str, Any]) -> str:
    """→ `python scripts/NAME.py --flag value ..`, over several lines where it is long, to be pasted into a shell."""
    words = [f"python scripts/{script}.py"]
    for name, value in flags.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        values = [each if isinstance(each, str) else json.dumps(each) for each in values]
        words.append(" ".join([f"--{name}", *map(shlex.quote, values)]))
    return " ".join(words) if sum(map(len, words)) < 90 else " \\\n    ".join(words)


def training_record(
    trainer: Trainer,
    args: TrainingArguments,
    corpus: Corpus,
    seconds: float,
    first_step: int,
    others: Sequence[Any],
) -> dict[str, Any]:
    """The record as `training.json` holds it, without losses.

    Args:
        trainer: after its last step.
        args: the `RelPosTrainingArguments` of the run.
        corpus: what was trained on.
        seconds: on the clock since the start or the resumption, evaluations included.
        first_step: the step that was resumed from, or 0.
        others: the other dataclasses that the command line was read into.
    """
    config, steps = trainer.model.config, trainer.state.global_step
    tokens_per_step = (
        args.per_device_train_batch_size
        * max(1, args.n_gpu)
        * args.world_size
        * args.gradient_accumulation_steps
        * args.block_size
    )
    seconds -= sum(
        entry["eval_runtime"]
        for entry in trainer.state.log_history
        if "eval_runtime" in entry and first_step < entry["step"]
    )
    recipe = {name: getattr(value := getattr(args, name), "value", value) for name in RECIPE_FIELDS}
    recipe |= {name: getattr(config, name) for name in ("vocab_size", "hidden_dropout", "attention_dropout")}
    return {
        "pos_embedding_type": config.pos_embedding_type,
        "pos_embedding_kwargs": config.pos_embedding_kwargs,
        "rope_parameters": getattr(config, "rope_parameters", None),
        "position_start_augmentation": config.position_start_augmentation,
        "position_sampling": config.position_sampling,
        "layer_types": getattr(config, "layer_types", None),
        "sliding_window": config.sliding_window,
        "seed": args.seed,
        "data_seed": args.data_seed,
        "train_length": args.block_size,
        "shape": {name: getattr(config, name) for name in SHAPE_FIELDS},
        "num_parameters": trainer.model.num_parameters(),
        "num_steps": steps,
        "num_processes": args.world_size,
        "distributed_type": trainer.accelerator.distributed_type.value,
        "tokens_per_step": tokens_per_step,
        "num_tokens": steps * tokens_per_step,
        "recipe": recipe,
        "script": args.script,
        "flags": given_flags(*others, args) | ({} if args.fp16 else {"bf16": args.bf16}),
        "resumed_from_step": first_step,
        "seconds": round(seconds, 1),
        "tokens_per_second": round((steps - first_step) * tokens_per_step / seconds, 1),
        "peak_memory_mib": round(peak_memory_mib(), 1),
        "log": [
            {key: entry[key] for key in ("step", "loss", "eval_loss") if key in entry}
            for entry in trainer.state.log_history
            if "loss" in entry or "eval_loss" in entry
        ],
        "corpus": {"name": corpus.name, "fingerprint": corpus.fingerprint},
        "versions": versions(),
        "hardware": hardware(),
    }


def read_record(name: str) -> dict[str, Any]:
    """The record of a saved model, of a folder or of the Hub; empty if there is none."""
    path = cached_file(name, TRAINING_RECORD, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else {}


def base_facts(name: str, train_length: int | None) -> dict[str, Any]:
    """What the record of a run holds of the model that it goes on from: its name, length and how it was made."""
    base, own_name = read_record(name), Path(name).name if Path(name).exists() else name
    made = [{"name": own_name, "script": base["script"], "flags": base["flags"]}] if "flags" in base else []
    return {"base_model": own_name, "base_train_length": train_length, "history": base.get("history", []) + made}
