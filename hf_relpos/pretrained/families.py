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
        dropped: a dropout of theirs → ours that stands for it, whatever its value.
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
    dropped: dict[str, str] = field(default_factory=dict)
    weights: tuple[tuple[str, str], ...] = ()
    fused: tuple[str, bool] | None = None
    transposed: str | None = None


def _windows(config: PreTrainedConfig) -> dict[str, Any]:
    """The layers that slide, as `layer_types` has them; in Mistral all of them do or none."""
    layer_types, window = getattr(config, "layer_types", None), config.sliding_window
    if layer_types is None:
        return {} if window is None else {"sliding_window": window}
    return {"layer_types": list(layer_types), "sliding_window": window} if "sliding_attention" in layer_types else {}


def _layers_without_rotation(config: PreTrainedConfig) -> dict[str, Any]:
    """SmolLM3: `no_rope_layers` holds a 1 for each layer that rotates."""
    parts = ["rotary" if rotates else "none" for rotates in config.no_rope_layers]
    period = next(n for n in range(1, len(parts) + 1) if all(parts[i] == parts[i % n] for i in range(len(parts))))
    return {"pos_embedding_type": "/".join(parts[:period]), **_windows(config)}


def _mpt(config: PreTrainedConfig) -> dict[str, Any]:
    if config.n_heads & (config.n_heads - 1):
        _refuse("n_heads", "a power of two, beyond which MPT orders its slopes otherwise", config.n_heads)
    dropout = config.attn_config.attn_pdrop
    return {"intermediate_size": 4 * config.d_model, "hidden_dropout": dropout, "attention_dropout": dropout}


MLP_NAMES = ((r"\.dense_h_to_4h\.", ".up_proj."), (r"\.dense_4h_to_h\.", ".down_proj."))
WINDOWS = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
FAMILIES = {
    "llama": Family(same=(*LLAMA_SAME, "attention_bias", "mlp_bias"), constant=LLAMA, required=LLAMA_REQUIRED),
    "mistral": Family(constant=LLAMA, required=LLAMA_REQUIRED, derive=_windows, derived_from=WINDOWS),
    "qwen2": Family(
        constant=LLAMA | {"attention_bias": True, "attention_out_bias": False},
        required=LLAMA_REQUIRED,
        derive=_windows,
        derived_from=WINDOWS,
    ),
    "qwen3": Family(
        same=(*LLAMA_SAME, "attention_bias"),
        constant=LLAMA | {"qk_norm": "head"},
        required=LLAMA_REQUIRED,
        derive=_windows,
        derived_from=WINDOWS,
    ),
    "smollm3": Family(
        same=(*LLAMA_SAME, "attention_bias", "mlp_bias"),
        constant=LLAMA,
        required=LLAMA_REQUIRED,
        derive=_layers_without_rotation,
        derived_from=(*WINDOWS, "no_rope_layers", "no_rope_layer_interval"),
    ),
    "olmo2": Family(
        same=(*LLAMA_SAME, "attention_bias"),
        constant=LLAMA | {"qk_norm": "layer", "norm_placement": "after"},
        required=LLAMA_REQUIRED,
    ),
    "gpt_neox": Family(
        same=(*SAME, "intermediate_size", "hidden_act", "hidden_dropout", "attention_dropout", "attention_bias")
        + ("layer_norm_eps", "max_position_embeddings", "rope_parameters", "use_parallel_residual"),
        constant=LAYER_NORM | {"pos_embedding_type": "rotary", "mlp_bias": True},
        weights=(
            (r"^embed_in\.", "embed_tokens."),
            (r"^embed_out\.", "lm_head."),
            (r"^final_layer_norm\.", "norm."),
            (r"\.attention\.dense\.", ".self_attn.o_proj."),
            (r"\.attention\.", ".self_attn."),
            *MLP_NAMES,
        ),
        fused=("query_key_value", True),
    ),
    "gpt2": Family(
        same=(*SAME, "max_position_embeddings"),
        renamed={
            "activation_function": "hidden_act",
            "layer_norm_epsilon": "layer_norm_eps",
            "resid_pdrop": "hidden_dropout",
            "attn_pdrop": "attention_dropout",
        },
        constant=LAYER_NORM | {"pos_embedding_type": "learned", "mlp_bias": True, "attention_bias": True},
        required={
            "add_cross_attention": False,
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "reorder_and_upcast_attn": False,
        },
        neutral=("summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels")
        + ("summary_first_dropout",),
        derive=lambda config: {"intermediate_size": config.n_inner or 4 * config.n_embd},
        derived_from=("n_inner",),
        dropped={"embd_pdrop": "hidden_dropout"},
        weights=(
            (r"^wte\.", "embed_tokens."),
            (r"^wpe\.", "position_embeddings.learned.embedding."),
            (r"^ln_f\.", "norm."),
            (r"^h\.", "layers."),
            (r"\.ln_1\.", ".input_layernorm."),
            (r"\.ln_2\.", ".post_attention_layernorm."),
            (r"\.attn\.c_proj\.", ".self_attn.o_proj."),
            (r"\.attn\.", ".self_attn."),
            (r"\.mlp\.c_fc\.", ".mlp.up_proj."),
            (r"\.mlp\.c_proj\.", ".mlp.down_proj."),
        ),
        fused=("c_attn", False),
        transposed=r"\.layers\.\d+\.(self_attn|mlp)\.",
    ),
    "bloom": Family(
        same=(*SAME, "hidden_dropout", "attention_dropout"),
        renamed={"layer_norm_epsilon": "layer_norm_eps"},
        constant=LAYER_NORM
        | {"pos_embedding_type": "alibi", "embed_norm": True, "hidden_act": "gelu_pytorch_tanh"}
        | {"attention_bias": True, "mlp_bias": True},
        required={"apply_residual_connection_post_layernorm": False},
        neutral=("slow_but_exact",),
        derive=lambda config: {
            "intermediate_size": 4 * config.hidden_size,
            "max_position_embeddings": getattr(config, "seq_length", 2048),
        },
        weights=(
            (r"^word_embeddings\.", "embed_tokens."),
            (r"^word_embeddings_layernorm\.", "embed_norm."),
            (r"^ln_f\.", "norm."),
            (r"^h\.", "layers."),
            (r"\.self_attention\.dense\.", ".self_attn.o_proj."),
            (r"\.self_attention\.", ".self_attn."),
            *MLP_NAMES,
        ),
        fused=("query_key_value", True),
    ),
    "mpt": Family(
        same=SAME,
        renamed={"layer_norm_epsilon": "layer_norm_eps", "max_seq_len": "max_position_embeddings"},
        constant=LAYER_NORM | {"pos_embedding_type": "alibi", "norm_bias": False, "hidden_act": "gelu"},
        required={
            "expansion_ratio": 4,
            "no_bias": True,
            "logit_scale": None,
            "attn_config.attn_type": "multihead_attention",
            "attn_config.alibi": True,
            "attn_config.alibi_bias_max": 8,
            "attn_config.clip_qkv": None,
            "attn_config.qk_ln": False,
            "attn_config.softmax_scale": None,
            "attn_config.prefix_lm": False,
            "attn_config.attn_uses_sequence_id": False,
        },
        neutral=("resid_pdrop", "emb_pdrop", "learned_pos_emb", "attn_config", "init_device", "embedding_fraction")
        + ("norm_type",),
        derive=_mpt,
        weights=(
            (r"^wte\.", "embed_tokens."),
            (r"^norm_f\.", "norm."),
            (r"^blocks\.", "layers."),
            (r"\.norm_1\.", ".input_layernorm."),
            (r"\.norm_2\.", ".post_attention_layernorm."),
            (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.attn\.", ".self_attn."),
            (r"\.ffn\.", ".mlp."),
        ),
        fused=("Wqkv", False),
    ),
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
    changes = {
        theirs: [getattr(config, theirs), made[ours]]
        for theirs, ours in family.dropped.items()
        if getattr(config, theirs) != made[ours]
    }
    padding = made.get("pad_token_id")
    if padding is not None and not 0 <= padding < config.vocab_size:
        changes["pad_token_id"] = [made.pop("pad_token_id"), None]
    return made, changes


def pretraining_length(config: PreTrainedConfig) -> int | None:
    """The length in tokens that a model of another family was trained at, as an import states it; `None` where no
    import is possible."""
    try:
        return represented_fields(config)[0]["train_length"]
    except ValueError:
        return None


def _check_other_fields(config: PreTrainedConfig, family: Family) -> None:
    """Refuses a field of theirs that no part of the entry speaks of, unless it has its default."""
    spoken_of = {*family.same, *family.renamed, *family.neutral, *family.derived_from, *family.dropped, *NEUTRAL}
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
