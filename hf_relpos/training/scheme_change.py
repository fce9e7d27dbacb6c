"""Another position scheme for a saved model: which weights are copied, which are reinitialized, and why."""

from typing import Any

import torch

from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model.scheme_base import StartGate
from ..model.scheme_registry import position_embedding_classes
from ..model.scheme_rotary import ROPE_TYPES
from ..pretrained.importing import is_foreign
from ..tasks.arguments import DataArguments
from .model_arguments import ChangeArguments, SavedModelArguments
from .model_setup import load_saved, new_model, parse_json, repeat_layer_types


# fields whose values are no changes of a model
NO_CHANGES = ("_name_or_path", "dtype")


def load_changed(
    model_args: ChangeArguments, data_args: DataArguments, block_size: int, seed: int
) -> tuple[RelPosForCausalLM, Any, dict[str, Any]]:
    """The saved model with the changes that are asked for.

    Args:
        model_args, data_args: what scripts/finetune.py takes.
        block_size: tokens of a block, the rows of a new learned table.
        seed: of the parameters that are reinitialized.

    Returns:
        the model, its tokenizer, and what was changed: `fields` name → [before, after], `copied` in words,
        `reinitialized` and `dropped` parameter → why; empty if nothing was changed.

    Raises:
        ValueError: for changes that do not fit the model or each other.
    """
    names = ("model_name_or_path", "attn_implementation", "position_sampling")
    plain = SavedModelArguments(**{name: getattr(model_args, name) for name in names})
    model, tokenizer = load_saved(plain, data_args)
    config = changed_config(model.config, model_args, block_size)
    before, after = _saved_fields(model_args.model_name_or_path, model.config), config.to_dict()
    names = [name for name in before | after if before.get(name) != after.get(name) and name not in NO_CHANGES]
    fields = {name: [before.get(name), after.get(name)] for name in names}
    if not fields:
        return model, tokenizer, {}
    changed, told = with_weights(model, config, seed, model_args.attn_implementation)
    return changed, tokenizer, {"fields": fields, **told}


def _saved_fields(name: str, loaded: RelPosConfig) -> dict[str, Any]:
    """The fields of a saved model, before the flags that `load_saved` applies; an imported one draws no positions."""
    if is_foreign(name):
        return loaded.to_dict() | {"position_sampling": None}
    return RelPosConfig.from_dict(RelPosConfig.get_config_dict(name)[0]).to_dict()


def changed_config(saved: RelPosConfig, changes: ChangeArguments, block_size: int) -> RelPosConfig:
    """The configuration of `saved` after `changes`; raises `ValueError` if they do not fit it."""
    fields = saved.to_dict()
    rope = fields.pop("rope_parameters", None)
    scheme = fields["pos_embedding_type"] = changes.pos_embedding_type or saved.pos_embedding_type
    old, new = (position_embedding_classes(name) for name in (saved.pos_embedding_type, scheme))
    kept = {option for name, cls in new.items() if name in old for option in cls.defaults}
    options = {name: value for name, value in (saved.pos_embedding_kwargs or {}).items() if name in kept}
    fields["pos_embedding_kwargs"] = options | parse_json("pos_embedding_kwargs", changes.pos_embedding_kwargs)
    fields["position_gates"] = _gates(saved, old, new, changes.start_at_zero)
    given = parse_json("rope_parameters", changes.rope_parameters)
    if any(cls.uses_rope_parameters for cls in new.values()) and (rope or given):
        fields["rope_parameters"] = _rotation(rope or {}, given, saved.train_length)
    elif given:
        fields["rope_parameters"] = given  # refused by the configuration
    _change_layers(fields, changes)
    _change_positions(fields, changes, block_size, any(cls.has_position_limit for cls in old.values()))
    return RelPosConfig.from_dict(fields)


def _gates(
    saved: RelPosConfig, old: dict[str, type], new: dict[str, type], start_at_zero: bool | None
) -> list[str] | None:
    """The schemes whose learned factor starts, or started, at 0."""
    if start_at_zero is None:
        start_at_zero = saved.imported_from is not None and {*old} <= {*new}
    kept = [name for name in saved.position_gates or () if name in new]
    added = [name for name, cls in new.items() if name not in old and StartGate.fits(cls)]
    return [*kept, *(added if start_at_zero else ())] or None


def _rotation(saved: dict[str, Any], given: dict[str, Any], train_length: int | None) -> dict[str, Any]:
    """The old rotation with what is given; of another type, only its base and its share of the channels are kept."""
    if not given:
        return saved
    rope_type = given.get("rope_type", saved.get("rope_type", "default"))
    if rope_type != saved.get("rope_type"):
        saved = {name: saved[name] for name in ("rope_theta", "partial_rotary_factor") if name in saved}
    rotation = {"rope_type": rope_type, **saved, **given}
    if train_length and "original_max_position_embeddings" in ROPE_TYPES.get(rope_type, ((), ()))[1]:
        rotation.setdefault("original_max_position_embeddings", train_length)
    return rotation


def _change_layers(fields: dict[str, Any], changes: ChangeArguments) -> None:
    if changes.sliding_window is not None:
        fields["sliding_window"] = changes.sliding_window
    if changes.layer_types is not None:
        fields["layer_types"] = repeat_layer_types(changes.layer_types, fields["num_hidden_layers"])
        if "sliding_attention" not in fields["layer_types"] and changes.sliding_window is None:
            fields["sliding_window"] = None
    if fields.get("sliding_window") is None and set(fields.get("layer_types") or ()) <= {"full_attention"}:
        fields.pop("layer_types", None)


def _change_positions(fields: dict[str, Any], changes: ChangeArguments, block_size: int, had_table: bool) -> None:
    classes = position_embedding_classes(fields["pos_embedding_type"]).values()
    has_table = any(cls.has_position_limit for cls in classes)
    length, rope_type = changes.max_position_embeddings, (fields.get("rope_parameters") or {}).get("rope_type")
    if length is not None and has_table and had_table:
        raise ValueError(
            "`max_position_embeddings` is the number of rows of the saved model's learned table; "
            f"--extend_learned_positions true lengthens it, got {length}."
        )
    if length is not None:
        fields["max_position_embeddings"] = length
    elif has_table and not had_table and not (fields["position_sampling"] or fields["position_start_augmentation"]):
        fields["max_position_embeddings"] = block_size  # a larger table would have rows that no training step reaches
    elif rope_type == "dynamic" and changes.rope_parameters is not None and fields["train_length"]:
        fields["max_position_embeddings"] = fields["train_length"]  # where it has its original length
    elif rope_type == "yarn" and changes.rope_parameters is not None:
        _set_stretched_length(fields, has_table)
    if rope_type == "dynamic" and block_size > fields["max_position_embeddings"]:
        raise ValueError(
            "`block_size` must be at most `max_position_embeddings`, the original length of rope_type 'dynamic', "
            f"{fields['max_position_embeddings']}, got {block_size}."
        )


def _set_stretched_length(fields: dict[str, Any], has_table: bool) -> None:
    """Of YaRN, `max_position_embeddings` is the length that the factor stretches to, as transformers compares them."""
    rotation = fields["rope_parameters"]
    original, factor = rotation.get("original_max_position_embeddings"), rotation.get("factor")
    is_drawn_from = fields["position_sampling"] or fields["position_start_augmentation"]
    if has_table or is_drawn_from or not all(isinstance(value, (int, float)) for value in (original, factor)):
        return
    if (length := original * factor) == int(length) and length > 0:
        fields["max_position_embeddings"] = int(length)


def with_weights(
    old: RelPosForCausalLM, config: RelPosConfig, seed: int, attn_implementation: str | None = None
) -> tuple[RelPosForCausalLM, dict[str, Any]]:
    """A model of another configuration with the weights of `old` that fit; those that it lacks are new.

    Where none is new the two share their memory.

    Args:
        old: the saved model.
        config: of the new one.
        seed: of what is new.
        attn_implementation: of the new one, sdpa by default.

    Returns:
        the model, and what was copied, as `copy_weights` says it.
    """
    with torch.device("meta"):
        changed = RelPosForCausalLM._from_config(config, attn_implementation=attn_implementation)
    theirs = old.state_dict()
    told = _compare(theirs, changed.state_dict())
    if told["reinitialized"]:
        changed = new_model(config, seed, attn_implementation)
        copy_weights(old, changed)
    else:
        changed.load_state_dict({name: theirs[name] for name in changed.state_dict()}, assign=True)
        changed.tie_weights()
    changed.generation_config = old.generation_config
    return changed, told


def copy_weights(old: RelPosForCausalLM, new: RelPosForCausalLM) -> dict[str, Any]:
    """Copies the weights that both models have in one shape from `old` to `new`; → what was copied and what was not."""
    theirs, ours = old.state_dict(), new.state_dict()
    new.load_state_dict({name: theirs[name] for name in _common(theirs, ours)}, strict=False)
    return _compare(theirs, ours)


def _common(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> list[str]:
    """The names of the weights that both models have in one shape."""
    return [name for name, weight in ours.items() if name in theirs and theirs[name].shape == weight.shape]


def _compare(theirs: dict[str, torch.Tensor], ours: dict[str, torch.Tensor]) -> dict[str, Any]:
    """→ which weights are copied, new and dropped."""
    common = _common(theirs, ours)
    reinitialized = {name: _reason(theirs.get(name), "the saved model") for name in ours.keys() - set(common)}
    dropped = {name: _reason(ours.get(name), "the new scheme") for name in theirs.keys() - set(common)}
    size = sum({theirs[name].data_ptr(): theirs[name].numel() for name in common}.values())  # tied ones count once
    return {
        "copied": f"{len(common)} tensors of {size:,} numbers",
        "reinitialized": dict(sorted(reinitialized.items())),
        "dropped": dict(sorted(dropped.items())),
    }


def _reason(other: Any, where: str) -> str:
    return f"{where} has none" if other is None else f"{where} has it in shape {tuple(other.shape)}"


def describe_changes(changes: dict[str, Any]) -> str:
    """The changes as lines of text, one for each field and parameter."""
    lines = [f"{name}: {before!r} -> {after!r}" for name, (before, after) in changes["fields"].items()]
    lines.append(f"copied: {changes['copied']}")
    for kind in ("reinitialized", "dropped"):
        lines += [f"{kind}: {name} ({reason})" for name, reason in changes[kind].items()]
    return "\n".join(lines)
