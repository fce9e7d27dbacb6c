"""The recipe of a run, kept with its checkpoints and its record: a run resumes with the recipe that it had."""

from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ..data.cache import digest
from ..environment import place_name
from ..file_reading import read_json
from ..model.saved_code import saved_code
from ..model_loading import model_hashes
from ..results.training_record import UNRECORDED_FLAGS
from ..scheme_files import imported_files
from ..special_tokens import document_end
from .checkpoints import RECIPE
from .run import TrainingRun


# fields of the arguments that may differ between a run and its resumption: where files go, what is shown and how
NEUTRAL = UNRECORDED_FLAGS | {"override_recipe", "use_cpu", "local_rank", "log_level", "log_level_replica", "debug"}
NEUTRAL |= {"log_on_each_node", "logging_first_step", "logging_strategy", "logging_nan_inf_filter", "ddp_timeout"}
NEUTRAL |= {"save_strategy", "save_on_each_node", "skip_memory_metrics", "push_to_hub", "do_train", "do_eval"}
NEUTRAL |= {"do_predict", "enable_jit_checkpoint", "per_device_eval_batch_size", "eval_on_start"}
NEUTRAL |= {"dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"}
NEUTRAL |= {"dataloader_persistent_workers", "restore_callback_states_from_checkpoint"}
NEUTRAL_STARTS = ("hub_", "trackio_")
DATA_FIELDS = ("streaming", "cross_document_attention", "validation_split_percentage", "max_eval_samples")
# what a checkpoint cannot go on with
FIXED = {"optim", "optim_args", "fp16", "fsdp", "fsdp_config", "deepspeed", "base_model", "changes", "tokenizer"}
FIXED |= {"lora_rank", "lora_alpha", "scheme_schedule", "scheme_schedule_steps"}


@dataclass
class Recipe:
    """What determines a run besides its configuration.

    Attributes:
        values: name → JSON value, of the arguments only those that are not the default.
        num_processes: of the run; each has random numbers of its own in a checkpoint.
        overrides: what earlier resumptions changed: `step`, and for each name the `values` before and after.
    """

    values: dict[str, Any]
    num_processes: int = 1
    overrides: list[dict[str, Any]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As in recipe.json of a checkpoint and in `training.json`."""
        return {"values": self.values, "num_processes": self.num_processes, "overrides": self.overrides}


def run_recipe(run: TrainingRun) -> Recipe:
    """The recipe that the flags of a run state."""
    values: dict[str, Any] = {}
    for each in fields(run.args):
        if each.name in NEUTRAL or each.name.startswith(NEUTRAL_STARTS) or each.name.endswith("_token"):
            continue
        value = _plain(getattr(run.args, each.name, None))
        if isinstance(value, str) and Path(value).is_absolute():
            value = place_name(value)  # paths of this machine stay here
        if each.init and value != _default(each):
            values[each.name] = value
    values |= {name: getattr(run.data_args, name) for name in DATA_FIELDS if hasattr(run.data_args, name)}
    corpus = run.data.corpus.record
    values |= {"corpus": corpus["name"], "corpus_fingerprint": corpus["fingerprint"]}
    values["tokenizer"] = _tokenizer_digest(run.data.tokenizer)
    values["num_processes"] = run.args.world_size * max(1, run.args.n_gpu)
    name = run.model_args.model_name_or_path
    values |= {"base_model": place_name(name) if name else None, "changes": _plain(run.changes) or None}
    return Recipe(values | _hashes(run), run.args.world_size)


def _hashes(run: TrainingRun) -> dict[str, str]:
    """What a run is made of besides its text, "what/file" → hash: a name says nothing of what lies under it."""
    name, tokenizer = run.model_args.model_name_or_path, run.data.tokenizer
    found = {f"base_model/{file}": value for file, value in model_hashes(name).items()} if name else {}
    if schemes := imported_files(run.model.config.pos_embedding_type):
        code = saved_code(run.model.config.pos_embedding_type)  # a file and its copy in a saved folder are one
        found |= {f"import_file/{file.name}": digest(code[file.name].decode()) for file in schemes}
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        found["tokenizer/tokenizer.json"] = digest(backend.to_str())
    return {name: value[:16] for name, value in found.items()}


def differences(theirs: dict[str, Any], ours: dict[str, Any], run: TrainingRun) -> dict[str, list[Any]]:
    """Name → the values of two recipes, where they differ; what one does not name has the default.

    A hash that the other recipe, of an earlier version, does not have tells nothing.
    """
    defaults = {each.name: _default(each) for each in fields(run.args)}
    found = {}
    for name in sorted(name for name in {*theirs, *ours} if name in theirs or "/" not in name):
        pair = [recipe.get(name, defaults.get(name)) for recipe in (theirs, ours)]
        if pair[0] != pair[1]:
            found[name] = pair
    return found


def check_recipe(run: TrainingRun, recipe: Recipe) -> dict[str, list[Any]]:
    """Compares a recipe with that of the run's checkpoint, and takes over what earlier resumptions changed.

    Returns:
        what differs, which `--override_recipe true` allows; it is added to `recipe.overrides`.

    Raises:
        ValueError: naming what differs and both values.
    """
    allowed, path = run.args.override_recipe, Path(run.checkpoint) / RECIPE
    if not path.is_file():
        if not allowed:
            raise ValueError(
                f"the checkpoint {run.checkpoint!r} holds no {RECIPE}, so its recipe cannot be compared; "
                "--override_recipe true resumes with the flags that are given."
            )
        recipe.overrides.append({"step": run.first_step, "values": None})
        return {}
    saved = read_json(path)
    overrides, values = saved.get("overrides", []), saved.get("values", {})
    if not isinstance(overrides, list) or not isinstance(values, dict):
        raise ValueError(f"{str(path)!r} must hold a dictionary `values` and a list `overrides`.")
    recipe.overrides = overrides
    found = differences(values, recipe.values, run)
    if not found:
        return {}
    listed = "; ".join(f"`{name}` is {theirs!r}, got {ours!r}" for name, (theirs, ours) in found.items())
    fixed = next((name for name in sorted(found) if name.partition("/")[0] in FIXED), None)
    if allowed and fixed:
        raise ValueError(f"the checkpoint {run.checkpoint!r} cannot go on with another `{fixed}`: {listed}.")
    if not allowed:
        raise ValueError(
            f"the recipe of the checkpoint {run.checkpoint!r} is another: {listed}; --override_recipe true resumes "
            "with the new one and records the change."
        )
    recipe.overrides.append({"step": run.first_step, "values": found})
    return found


def apply_overrides(changed: dict[str, Any], fresh: list[dict[str, Any]], optimizer: Any, scheduler: Any) -> None:
    """Puts the learning rate and the other numbers of the new recipe into an optimizer whose state was loaded.

    Args:
        changed: what differs.
        fresh: the groups of the optimizer before its state was loaded, without their parameters.
        optimizer, scheduler: with the state of the checkpoint.

    Raises:
        ValueError: if the schedule is none that can be changed.
    """
    for group, new in zip(optimizer.param_groups, fresh, strict=True):
        group.update(new)
    if isinstance(scheduler, torch.optim.lr_scheduler.LambdaLR):
        scheduler.base_lrs = [new.get("initial_lr", new["lr"]) for new in fresh]
        rates = [base * rate(scheduler.last_epoch) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate
        scheduler._last_lr = rates
    elif {"learning_rate", "lr_scheduler_type", "warmup_steps"} & changed.keys():
        raise ValueError(f"`lr_scheduler_type`: the schedule {type(scheduler).__name__} cannot be changed in a run.")


def reseed(changed: dict[str, Any], seed: int) -> None:
    """Draws on from the new seed, if that is what was changed."""
    if "seed" in changed:
        set_seed(seed)


def _default(each: Any) -> Any:
    return _plain(each.default_factory() if callable(each.default_factory) else each.default)


def _plain(value: Any) -> Any:
    """→ the value as JSON has it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _tokenizer_digest(tokenizer: Any) -> str:
    return digest(sorted(tokenizer.get_vocab().items()), document_end(tokenizer))[:24]
