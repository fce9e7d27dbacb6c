"""`hf-relpos import`: a pretrained model of another family becomes one of this, with the same logits."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..file_reading import reading
from ..model.configuration_checks import ROPE_KEYWORDS, replaced_rotation
from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model.saved_code import AUTO_MAP, saved_code
from .conversion import EMBEDDINGS, HEAD, Conversion, plan_conversion
from .families import check_fields, family_of, represented_fields
from .folders import (
    GENERATION_CONFIG,
    copy_generation_config,
    new_folder,
    write_tokenizer,
    write_weights,
)
from .gguf_weights import GgufWeights
from .sources import SafetensorsWeights, Source, find_source, read_config


def describe_import(config: RelPosConfig, name: str) -> str:
    """One line about a model that was imported."""
    origin = config.imported_from
    facts = [f"model_type {origin['model_type']}", f"pos_embedding_type {config.pos_embedding_type}"]
    facts += [f"{key} {origin[key]}" for key in ("base_model", "revision", "license") if origin[key]]
    facts += [f"{key} {before!r} -> {after!r}" for key, (before, after) in origin["changes"].items()]
    return f"imported {name}: {', '.join(facts)}"


def import_model(
    model: PreTrainedModel | str | Path,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    attn_implementation: str | None = None,
    **fields: Any,
) -> RelPosForCausalLM:
    """A pretrained model of another family as one of this, in the dtype of its weights; in that of its configuration
    where they have several.

    Args:
        model: loaded, with which the new one shares its memory where it can; or its folder, repository or GGUF file,
            of which one weight after the other is read.
        revision: branch, tag or commit of a repository of the Hub.
        base_model: the repository that it comes from, or "none" if it was never on the Hub; by default that of its
            name.
        license: of the weights; by default as its card states it.
        attn_implementation: of the new model, as in `from_pretrained`.
        **fields: other values for fields of the configuration that have no weights, such as `position_sampling`.

    Returns:
        the model, in evaluation mode; `config.imported_from` says where it comes from.

    Raises:
        ValueError: for a field that cannot be represented, or weights that do not fit the configuration.
    """
    if isinstance(model, PreTrainedModel):
        return _import_loaded(model, base_model, license, attn_implementation, fields)
    if not isinstance(model, (str, Path)):
        raise ValueError(f"`model` must be a PreTrainedModel or the name of one, got {type(model).__name__}.")
    source = find_source(model, revision)
    theirs, weights = _open(source)
    conversion, config = _convert(theirs, weights.shapes, weights.dtypes, weights, source.name)
    config = _described(config, theirs, source, base_model, license, fields)
    if source.gguf_file:
        return _build(config, conversion, lambda name: conversion.weight(name, weights), attn_implementation)
    dtypes = {weight.dtype for weight in conversion.targets.values()}
    dtype = None if len(dtypes) == 1 else theirs.dtype or conversion.targets[EMBEDDINGS].dtype  # as transformers loads
    # copies: what a file maps into memory is that of the file
    made = _build(config, conversion, lambda name: _owned(conversion.weight(name, weights), dtype), attn_implementation)
    if (source.folder / GENERATION_CONFIG).is_file():
        made.generation_config = GenerationConfig.from_pretrained(source.folder)
    return made


def import_pretrained(
    name: str | Path,
    folder: str | Path,
    revision: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> RelPosConfig:
    """Imports a model into a new folder, with tokenizer, generation configuration and chat template.

    The weights are written one at a time, in their dtype; those of a GGUF file are dequantised to fp32.

    Args:
        name: of a folder, a repository of the Hub or a GGUF file.
        folder: to write; there must be none.
        revision, base_model, license: as in `import_model`.

    Returns:
        the configuration of what was written.

    Raises:
        ValueError: as `import_model`, and if the folder exists; nothing is written then.
    """
    with new_folder(folder) as part:
        source = find_source(name, revision)
        config = _write(source, part, base_model, license)
        write_tokenizer(source, part)
    return config


def is_foreign(name: str) -> bool:
    """Whether a folder or a repository of the Hub holds a model of another family."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        return False
    try:
        saved = PreTrainedConfig.get_config_dict(name)[0]
    except (OSError, ValueError):  # whoever loads it says what is wrong
        return False
    return saved.get("model_type") not in (None, RelPosConfig.model_type)


# --- configuration and weights


def _open(source: Source) -> tuple[PreTrainedConfig, SafetensorsWeights | GgufWeights]:
    if source.gguf_file:
        weights = GgufWeights(source)
        check_fields({**weights.config.to_dict(), "model_type": weights.config.model_type, "quantization_config": None})
        return weights.config, weights
    saved = read_config(source)
    check_fields(saved)
    with reading(f"`model` {source.name!r}: config.json cannot be read"):
        config = AutoConfig.from_pretrained(source.folder)
    return config, SafetensorsWeights(source)


def _import_loaded(
    model: PreTrainedModel,
    base_model: str | None,
    license: str | None,
    attn_implementation: str | None,
    fields: dict[str, Any],
) -> RelPosForCausalLM:
    theirs, weights = model.config, model.state_dict()
    check_fields({**theirs.to_dict(), "model_type": theirs.model_type, "quantization_config": None})
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    dtypes = {name: weight.dtype for name, weight in weights.items()}
    conversion, config = _convert(theirs, shapes, dtypes, weights, type(model).__name__)
    source = Source("", Path(), base_model=_repository(model), revision=getattr(theirs, "_commit_hash", None))
    config = _described(config, theirs, source, base_model, license, fields)
    attn_implementation = attn_implementation or theirs._attn_implementation
    made = _build(config, conversion, lambda name: conversion.weight(name, weights), attn_implementation)
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def _convert(
    theirs: PreTrainedConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    weights: Mapping[str, torch.Tensor],
    name: str,
) -> tuple[Conversion, tuple[dict[str, Any], dict[str, list[Any]]]]:
    """How the weights become ours, and the fields of the configuration with what they change."""
    fields, changes = represented_fields(theirs)
    RelPosConfig(**fields)  # says what is wrong before transformers builds a model of it
    conversion = plan_conversion(family_of(theirs.model_type), theirs, shapes, dtypes, weights, name)
    if fields["tie_word_embeddings"] and not conversion.is_tied:  # as transformers decides
        fields["tie_word_embeddings"], changes["tie_word_embeddings"] = False, [True, False]
    return conversion, (fields, changes)


def _described(
    made: tuple[dict[str, Any], dict[str, list[Any]]],
    theirs: PreTrainedConfig,
    source: Source,
    base_model: str | None,
    license: str | None,
    others: dict[str, Any],
) -> RelPosConfig:
    """The configuration, with where the model comes from."""
    fields, changes = made
    for name in ("pos_embedding_type", "tie_word_embeddings"):  # the weights are for these values alone
        if (wanted := others.get(name, fields[name])) != fields[name]:
            raise ValueError(f"`{name}` of the imported model is {fields[name]!r}, got {wanted!r}.")
    for name in ("dtype", "torch_dtype", "device_map"):
        if others.get(name) is not None:
            raise ValueError(
                f"`{name}` must be None: a model is imported in the dtype of its weights, to the CPU, and moved by "
                f"`.to()`, got {others[name]!r}."
            )
    if rotation := {name: others[name] for name in ("rope_parameters", *ROPE_KEYWORDS) if name in others}:
        others = {**others, "rope_parameters": replaced_rotation(fields.get("rope_parameters"), rotation)}
    imported_from = {
        "base_model": base_model or source.base_model,
        "revision": source.revision,
        "license": license or source.license,
        "model_type": theirs.model_type,
        "changes": changes,
    }
    config = RelPosConfig(**{**fields, **others, "imported_from": imported_from})
    config.architectures = [RelPosForCausalLM.__name__]
    config.dtype = theirs.dtype
    return config


def _build(
    config: RelPosConfig, conversion: Conversion, read: Callable[[str], torch.Tensor], attn_implementation: str | None
) -> RelPosForCausalLM:
    """The model, each of its weights as `read` gives it."""
    with torch.device("meta"):
        model = RelPosForCausalLM._from_config(config, attn_implementation=attn_implementation)
    conversion.check(model.state_dict())
    weights = {name: read(name) for name in conversion.targets}
    if config.tie_word_embeddings:
        weights[HEAD] = weights[EMBEDDINGS]
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    config.dtype = model.dtype
    return model.eval()


def _owned(weight: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return weight.to(dtype or weight.dtype, copy=True, memory_format=torch.contiguous_format)


def _repository(model: PreTrainedModel) -> str | None:
    """The repository that a loaded model comes from, as far as its name tells."""
    name = model.name_or_path or ""
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) and not Path(name).exists() else None


# --- the folder


def _write(source: Source, folder: Path, base_model: str | None, license: str | None) -> RelPosConfig:
    theirs, weights = _open(source)
    conversion, made = _convert(theirs, weights.shapes, weights.dtypes, weights, source.name)
    config = _described(made, theirs, source, base_model, license, {})
    config.dtype = config.dtype or next(iter(conversion.targets.values())).dtype
    with torch.device("meta"):
        conversion.check(RelPosForCausalLM(config).state_dict())
    config.auto_map, config._auto_class = dict(AUTO_MAP), None
    for name, content in saved_code(config.pos_embedding_type).items():
        (folder / name).write_bytes(content)
    config.save_pretrained(folder)
    if source.gguf_file:
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    else:
        copy_generation_config(source, folder)
    write_weights(folder, conversion.targets, lambda name: conversion.weight(name, weights))
    return config
