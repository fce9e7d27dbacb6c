"""Saved models and their tokenizers, with one clear error for a folder or repository that holds none.

Nothing here imports the data libraries: loading a model needs torch and transformers only.
"""

import copy
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils import cached_file

from .file_reading import MODEL_FILES, TOKENIZER_FILES, TRAINING_RECORD, no_model, read_json, reading, reason
from .model.configuration_relpos import RelPosConfig
from .model.modeling_relpos import RelPosForCausalLM


logger = logging.getLogger(__name__)

MODEL_FLAG = "`model_name_or_path`"
NOT_FINITE = "holds NaN or infinity"
WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
VERSION = "transformers_version"  # of config.json: of the library that wrote it
# what config.json and the record of the training must agree in: another scheme computes with weights trained otherwise
SCHEME_FIELDS = (
    "pos_embedding_type",
    "pos_embedding_kwargs",
    "rope_parameters",
    "position_gates",
    "layer_types",
    "sliding_window",
)
# a config.json of a few bytes can ask for any number
MAX_LAYERS = 4096


def load_model(name: str, model_class: Any, flag: str = MODEL_FLAG, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(name)`, with one clear error for what is not a model.

    Args:
        name: a folder, or a name on the Hub.
        model_class: that loads it.
        flag: what to call it in an error.
        **kwargs: of `from_pretrained`.

    Raises:
        ValueError: if the folder or repository is missing, holds no model, one that does not fit, or one that is
            damaged.
    """
    check_folder(name, flag)
    what = f"{flag} {name!r} cannot be loaded"
    with _loading(name, what):
        saved, _ = RelPosConfig.get_config_dict(name)
        is_family = isinstance(saved, dict) and saved.get("model_type") == RelPosConfig.model_type
        if is_family:
            check_size(RelPosConfig.from_dict(saved))
    if model_class is RelPosForCausalLM and not is_family:
        raise ValueError(
            f"{flag} {name!r} must be a model of the family ('relpos'), got model_type {saved.get('model_type')!r}."
        )
    if is_family:
        warn_of_edits(name)
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # which are refused here, by name
    with _loading(name, what), _without_report(is_family):
        model, report = model_class.from_pretrained(name, **kwargs)
        _check_generation_config(model)
    if wrong := _wrong_weights(model, report):
        raise ValueError(f"{flag} {name!r} holds other weights than its configuration says: {wrong}.")
    for key, weight in model.named_parameters():
        if weight.device.type != "meta" and not is_finite(weight.detach()):
            raise ValueError(f"{flag} {name!r}: the weights are not finite: {key!r} {NOT_FINITE}.")
    return model


def _wrong_weights(model: Any, report: dict[str, Any]) -> str:
    """In what the weights of a folder are others than the model's, of the report of `from_pretrained`; or ""."""
    for key, found, expected in sorted(report["mismatched_keys"]):
        return f"{key} has the shape {tuple(found)} in the file and {tuple(expected)} by config.json"
    missing = [f"{key} is missing" for key in sorted(report["missing_keys"])]
    if isinstance(model, RelPosForCausalLM):
        missing += [f"{key} is no weight of it" for key in sorted(report["unexpected_keys"])]
    return missing[0] if missing else ""


@contextmanager
def _without_report(is_family: bool) -> Iterator[None]:
    """Without transformers' table of weights that do not fit: of the family's models they are refused in one line."""
    transformers_logger = logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return not is_family or "LOAD REPORT" not in str(record.msg)

    transformers_logger.addFilter(is_other)
    try:
        yield
    finally:
        transformers_logger.removeFilter(is_other)


@contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """`reading` of what a folder or the Hub gives by a name; where it cannot be asked, the error says so."""
    try:
        with reading(what):
            yield
    except ValueError as error:
        cause = error.__cause__
        if os.path.isdir(name) or not isinstance(cause, OSError):
            raise
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set"
        elif isinstance(cause.__cause__, LocalEntryNotFoundError):
            why = "the Hub cannot be reached for it"
        else:
            why = f"the Hub gives no such model: {reason(cause).removesuffix('.')}"
        raise ValueError(f"{what}: it is no folder, and {why}.") from error


def edited_fields(name: str | Path) -> dict[str, list[Any]]:
    """In what the scheme of a saved folder is another than the record of its training says.

    Returns:
        field → [value in training.json, value in config.json]; empty where they agree, without a record, and for a name
        on the Hub.
    """
    record_file, config_file = Path(name) / TRAINING_RECORD, Path(name) / "config.json"
    if not record_file.is_file() or not config_file.is_file():
        return {}
    record, config = read_json(record_file, "training record"), read_json(config_file)
    recorded = {field: record[field] for field in SCHEME_FIELDS if field in record}
    others = {field: value for field, value in config.items() if field not in recorded}
    before = _scheme_fields({**others, **{field: value for field, value in recorded.items() if value is not None}})
    after = _scheme_fields(config)
    pairs = {field: [before.get(field) or None, after.get(field) or None] for field in recorded}
    return {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}


def warn_of_edits(name: str) -> None:
    """Says in one line that the scheme of a saved folder is not the one that was trained, where that is so."""
    if edits := edited_fields(name):
        logger.warning(f"{name}: {describe_edits(edits)}: this is not the scheme that was trained.")


def describe_edits(edits: dict[str, list[Any]]) -> str:
    """→ what `edited_fields` found, in words."""
    pairs = (
        f"`{field}` is {after!r} in config.json and {before!r} in training.json"
        for field, (before, after) in edits.items()
    )
    return "; ".join(pairs)


def _scheme_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a scheme with its defaults; as they stand where they are no configuration that is known here."""
    try:
        config = RelPosConfig.from_dict(copy.deepcopy(fields))
    except (ValueError, TypeError, LookupError, AttributeError):
        return fields
    return {field: getattr(config, field, None) for field in SCHEME_FIELDS}


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no number of a tensor is NaN or infinite."""
    if not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all())  # fp8 has no isfinite


def not_finite(path: str | Path) -> str | None:
    """The name of the first tensor of a safetensors file that holds NaN or infinity; raises `SafetensorError` for a
    file that is none."""
    with safe_open(path, "pt") as tensors:  # one at a time: the file may be larger than the memory
        return next((key for key in tensors.keys() if not is_finite(tensors.get_tensor(key))), None)


def model_hashes(name: str) -> dict[str, str]:
    """What a model is: file → hash, of its configuration, whatever version wrote it, and of its weights.

    Args:
        name: a folder, a file of weights, or a name on the Hub whose model was loaded before.
    """
    folder = Path(name)
    if not folder.exists():
        folder = Path(cached_file(name, "config.json")).parent
    files = [folder] if folder.is_file() else sorted(path for each in WEIGHT_FILES for path in folder.glob(each))
    found = {}
    for path in files:
        with open(path, "rb") as file:
            found[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if (folder / "config.json").is_file():
        config = {key: value for key, value in read_json(folder / "config.json").items() if key != VERSION}
        found["config.json"] = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return found


def check_folder(name: str, flag: str = MODEL_FLAG) -> None:
    """Looks at the folder of a model before any library reads it; a name on the Hub passes.

    Args:
        name: a folder, or a name on the Hub.
        flag: what to call it in an error.

    Raises:
        ValueError: if there is no such folder, if it holds no config.json (naming a checkpoint that lies in it), or if
            one of its JSON files is damaged.
    """
    path = Path(name)
    if os.path.isdir(name):
        if not (path / "config.json").is_file():
            raise ValueError(f"{flag} {name!r} is {no_model(path)}{_checkpoint_hint(path)}.")
        for file in MODEL_FILES:
            if (path / file).exists():
                read_json(path / file, f"{flag}: file")
    elif os.path.exists(name):
        raise ValueError(f"{flag} {name!r} is not a folder.")
    else:
        hint = folder_hint(name)
        is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or ("/" in name and _folders(path.parent))
        if is_path or hint:
            raise ValueError(f"{flag} {name!r}: there is no such folder{hint}.")
        _say_hub(name)


def folder_hint(name: str) -> str:
    """→ "", or a folder whose name is near that of one that is missing."""
    path = Path(name)
    near = get_close_matches(path.name, _folders(path.parent), 1)
    return f" (did you mean {str(path.with_name(near[0]))!r}?)" if near else ""


@cache
def _say_hub(name: str) -> None:
    """Says once that a name is looked up, which takes a while where there is no network."""
    if not constants.HF_HUB_OFFLINE:
        print(f"no folder {name!r} here: asking the Hub", file=sys.stderr)


def _checkpoint_hint(folder: Path) -> str:
    """→ "", or what an interrupted run has left there."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "config.json").is_file()]
    steps = {int(step): path for path in found if (step := path.name.rpartition("-")[2]).isdecimal()}
    if not steps:
        return ""
    return (
        f", but a run that was interrupted lies there: name its checkpoint, {str(steps[max(steps)])!r}, or finish it "
        "by its own command with --resume_from_checkpoint last"
    )


def _folders(parent: Path) -> list[str]:
    return [each.name for each in os.scandir(parent) if each.is_dir()] if os.path.isdir(parent) else []


def about_num_weights(config: RelPosConfig) -> int:
    """About the number of weights of a model that is not made yet: embeddings, attention and MLP without gates."""
    width, heads = config.hidden_size, config.num_attention_heads + config.num_key_value_heads
    per_layer = width * (2 * heads * config.head_dim + 2 * config.intermediate_size)
    rows = config.vocab_size * (1 if config.tie_word_embeddings else 2) + (config.max_positions or 0)
    return rows * width + config.num_hidden_layers * per_layer


def check_size(config: RelPosConfig) -> None:
    """Raises `ValueError` for a model that this machine cannot hold, before it is made."""
    if config.num_hidden_layers > MAX_LAYERS:
        raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {config.num_hidden_layers}.")
    num_weights = about_num_weights(config)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * num_weights > memory:
        raise ValueError(
            f"the configuration asks for {num_weights:.3g} weights (`hidden_size` {config.hidden_size}, "
            f"`num_hidden_layers` {config.num_hidden_layers}, `vocab_size` {config.vocab_size}): this machine's memory "
            f"holds {memory // 4:.3g}."
        )


def _check_generation_config(model: Any) -> None:
    """Raises `ValueError` for fields of generation_config.json of another type than theirs, or ids of no token."""
    config, vocab_size = getattr(model, "generation_config", None), getattr(model.config, "vocab_size", None)
    if config is None or vocab_size is None:
        return
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(type(each) is int and each < vocab_size for each in ids):
            raise ValueError(f"generation_config.json: `{name}` must be a token below {vocab_size}, got {value!r}.")
    defaults = GenerationConfig._get_default_generation_params()
    defaults |= {"output_attentions": False, "output_hidden_states": False}
    for name, default in defaults.items():
        value, kind = getattr(config, name, None), type(default)
        allowed = {int: (int,), float: (int, float), bool: (bool,)}.get(kind)
        if value is not None and allowed and name != "early_stopping" and type(value) not in allowed:
            raise ValueError(f"generation_config.json: `{name}` must be of type {kind.__name__}, got {value!r}.")


def load_tokenizer_of(name: str, what: str) -> Any:
    """A tokenizer by its name; raises `ValueError`, beginning with `what`, if there is none or it is damaged."""
    path = Path(name)
    for file in MODEL_FILES if path.is_dir() else ():
        if (path / file).exists():
            read_json(path / file, f"{what}: file")
    if path.is_dir() and not any((path / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"no tokenizer in {name!r}: `save_pretrained` of a tokenizer saves one there.")
    with _loading(name, what):
        tokenizer = AutoTokenizer.from_pretrained(name)
        if type(tokenizer.model_max_length) not in (int, float):
            raise ValueError(f"`model_max_length` must be a number, got {tokenizer.model_max_length!r}")
        tokenizer("a")
    return tokenizer


def load_model_tokenizer(name: str, model: Any) -> Any:
    """The tokenizer of `model`, by its name; raises `ValueError` if there is none or it has more entries."""
    tokenizer = load_tokenizer_of(name, f"no tokenizer can be loaded from {name!r}")
    largest = max(tokenizer.get_vocab().values(), default=0)
    if len(tokenizer) > model.config.vocab_size or largest >= model.config.vocab_size:
        check_vocab_size(tokenizer, model.config.vocab_size)
        raise ValueError(
            f"the tokenizer of {name!r} has an entry {largest}, past the `vocab_size` {model.config.vocab_size}."
        )
    return tokenizer


def check_vocab_size(tokenizer: Any, vocab_size: int) -> None:
    """Raises `ValueError` unless the tokenizer has exactly `vocab_size` entries."""
    if len(tokenizer) != vocab_size:
        raise ValueError(f"`vocab_size` of the model is {vocab_size}, but the tokenizer has {len(tokenizer)} entries.")
