"""The families of transformers whose models can be imported: which fields and weights are which here.

A further family is one more entry of `FAMILIES`.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from transformers import PreTrainedConfig


# a field that both have under one name
SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "initializer_range",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
LLAMA_SAME = (
    *SAME,
    "intermediate_size",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "attention_dropout",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)
LLAMA = {"pos_embedding_type": "rotary", "use_gated_mlp": True, "hidden_dropout": 0.0}
LAYER_NORM = {"norm_type": "layer_norm"}
# Llama and its kin take the field and rotate whole heads all the same
LLAMA_REQUIRED = {"rope_parameters.partial_rotary_factor": 1.0}
# fields that say nothing about the logits
NEUTRAL = ("use_cache", "pretraining_tp", "is_decoder", "classifier_dropout")
# names of fields, in any family, that change the logits in a way that no field here says → values that change nothing
CHANGES_LOGITS = {
    r"soft_?cap": (None, False, 0),
    r"(^|_)(experts?|moe)(_|$)": (None, False, 0, 1, [], {}),
    r"^clip_qkv$": (None, False),
    r"^(embedding|attention|residual|logits?)_(multiplier|scale|scaling)$|^scale_(emb|depth)$": (None, False, 1),
    r"^quantization_config$": (None, {}),
    r"^is_causal$": (None, True),
    r"^(use_)?bidirectional|^rope_interleaved$": (None, False),
}
# buffers that older files hold beside the weights
BUFFERS = r"\.(attention|attn|self_attn)\.((masked_)?bias|rotary_emb\.inv_freq)$|^(model\.)?rotary_emb\.inv_freq$"


@dataclass(frozen=True)
class Family:
    """How a family of transformers is represented.

    Attributes:
        same: fields that both have under one name.
        renamed: their field → ours.
        constant: ours, which all its models have.
        required: their field → the one value that can be represented.
        neutral: further fields of theirs that change no logits.
        derive: further fields of ours, from their configuration.
        derived_from: the fields of theirs that `derive` reads.
        weights: (pattern, replacement) for names of weights, without the name of the base model in front.
        fused: the pattern of a weight that holds queries, keys and values, and whether it holds them head by head.
        transposed: the pattern of weights that are stored as (inputs, outputs).
    """

    same: tuple[str, ...] = LLAMA_SAME
    renamed: dict[str, str] = field(default_factory=dict)
    constant: dict[str, Any] = field(default_factory=dict)
    required: dict[str, Any] = field(default_factory=dict)
    neutral: tuple[str, ...] = ()
    derive: Callable[[PreTrainedConfig], dict[str, Any]] = lambda config: {}
    derived_from: tuple[str, ...] = ()
    weights: tuple[tuple[str, str], ...] = ()
    fused: tuple[str, bool] | None = None
    transposed: str | None = None


FAMILIES = {
    "llama": Family(same=(*LLAMA_SAME, "attention_bias", "mlp_bias"), constant=LLAMA, required=LLAMA_REQUIRED),
}


def family_of(model_type: Any) -> Family:
    """The entry of a `model_type`; raises `ValueError` if there is none."""
    if model_type not in FAMILIES:
        raise ValueError(f"`model_type` must be one of {sorted(FAMILIES)} to be imported, got {model_type!r}.")
    return FAMILIES[model_type]


def check_fields(saved: dict[str, Any]) -> None:
    """Refuses a configuration, as config.json holds it, that says what no field here can.

    Raises:
        ValueError: naming the field and its value.
    """
    for name, value in saved.items():
        for pattern, neutral in CHANGES_LOGITS.items():
            if re.search(pattern, name) and not name.endswith("_implementation") and value not in neutral:
                _refuse(name, neutral[0], value)
    family_of(saved.get("model_type"))


def represented_fields(config: PreTrainedConfig) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """A configuration of another family → the fields of a `RelPosConfig`, and field → value there and here of those
    that are not kept.

    Raises:
        ValueError: for a field that cannot be represented, naming it and its value.
    """
    family = family_of(config.model_type)
    for name, value in family.required.items():
        found = _get(config, name)
        if found is not None and found != value:
            _refuse(name, value, found)
    _check_other_fields(config, family)
    made = {name: getattr(config, name) for name in family.same if getattr(config, name, None) is not None}
    made |= {ours: getattr(config, theirs) for theirs, ours in family.renamed.items()}
    made |= {**family.constant, **family.derive(config)}
    made |= {"embedding_multiplier": 1.0, "initializer": "normal", "train_length": made["max_position_embeddings"]}
    if "rotary" not in made["pos_embedding_type"]:
        made.pop("rope_parameters", None)
    changes = {}
    padding = made.get("pad_token_id")
    if padding is not None and not 0 <= padding < config.vocab_size:
        changes["pad_token_id"] = [made.pop("pad_token_id"), None]
    return made, changes


def _check_other_fields(config: PreTrainedConfig, family: Family) -> None:
    """Refuses a field of theirs that no part of the entry speaks of, unless it has its default."""
    spoken_of = {*family.same, *family.renamed, *family.neutral, *family.derived_from, *NEUTRAL}
    spoken_of |= {name.partition(".")[0] for name in family.required}
    spoken_of |= {config.attribute_map.get(name, name) for name in spoken_of}
    others = {item.name for item in fields(type(config))} - {item.name for item in fields(PreTrainedConfig)} - spoken_of
    default = type(config)()
    for name in sorted(others):
        if getattr(config, name) != getattr(default, name):
            _refuse(name, getattr(default, name), getattr(config, name))


def _get(config: Any, name: str) -> Any:
    """The value of "field" or of "field.key", `None` if there is none."""
    for part in name.split("."):
        config = config.get(part) if isinstance(config, dict) else getattr(config, part, None)
    return config


def _refuse(name: str, allowed: Any, got: Any) -> None:
    raise ValueError(f"`{name}` must be {allowed!r} for a model that is imported, got {got!r}.")


# --- weights


def our_name(family: Family, name: str) -> str:
    """The name of a weight of theirs → ours, or that of the fused weight."""
    name = re.sub(r"^(model|transformer|gpt_neox)\.", "", name)
    for pattern, replacement in family.weights:
        name = re.sub(pattern, replacement, name)
    return name if name.startswith("lm_head.") else f"model.{name}"


def converters(family: Family, name: str, num_heads: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name of a weight, by `our_name` → names of the weights that are made of it, and how."""

    def whole(weight: torch.Tensor) -> torch.Tensor:
        is_transposed = family.transposed and weight.ndim == 2 and re.search(family.transposed, name)
        return weight.T if is_transposed else weight

    if family.fused is None or not re.search(family.fused[0], name):
        return {name: whole}
    groups = num_heads if family.fused[1] else 1

    def part(index: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda weight: whole(weight).unflatten(0, (groups, 3, -1))[:, index].flatten(0, 1).clone()

    return {re.sub(family.fused[0], f"{letter}_proj", name): part(index) for index, letter in enumerate("qkv")}
