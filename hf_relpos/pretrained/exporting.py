"""`hf-relpos export`: a model with rotary positions as a `LlamaForCausalLM`, with the same logits."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ..model.configuration_relpos import RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from .conversion import EMBEDDINGS, HEAD
from .families import LLAMA_SAME
from .folders import copy_generation_config, new_folder, write_tokenizer, write_weights
from .sources import SafetensorsWeights, Source, find_source, read_config


# what a Llama has, in the fields of the family
LLAMA = {
    "use_gated_mlp": True,
    "norm_type": "rms_norm",
    "norm_placement": "before",
    "use_parallel_residual": False,
    "qk_norm": None,
    "embed_norm": False,
    "sliding_window": None,
}
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")


def export_model(model: RelPosForCausalLM) -> LlamaForCausalLM:
    """A model of the family as a Llama with the same logits; the two share their memory where they can.

    Args:
        model: with the position scheme "rotary" in all layers, in the architecture of Llama.

    Returns:
        the model, in evaluation mode.

    Raises:
        ValueError: naming the field that a Llama does not have, or a weight, as adapters bring them.
    """
    config, weights = llama_config(model.config), model.state_dict()
    with torch.device("meta"):
        expected = LlamaForCausalLM._from_config(config).state_dict().keys()
    if others := sorted(weights.keys() ^ expected):
        raise ValueError(
            f"`model` must have the weights of a RelPosForCausalLM and no other, adapters merged: {others[0]!r} is "
            f"{'too many' if others[0] in weights else 'missing'}."
        )
    names = [name for name in weights if name != HEAD or not config.tie_word_embeddings]
    made = LlamaForCausalLM.from_pretrained(
        None,
        config=config,
        state_dict={name: _weight(name, model.config, weights) for name in names},
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    made.generation_config = copy.deepcopy(model.generation_config)
    return made


def export_pretrained(name: str | Path, folder: str | Path) -> None:
    """Writes a saved model of the family to a new folder as a Llama, with its tokenizer, one weight at a time.

    Args:
        name: of a folder, or of a repository of the Hub.
        folder: to write; there must be none.

    Raises:
        ValueError: as `export_model`, and if the folder exists; nothing is written then.
    """
    with new_folder(folder) as part:
        _write(find_source(name), part)


def _write(source: Source, part: Path) -> None:
    model_type = read_config(source).get("model_type")
    if model_type != RelPosConfig.model_type:
        raise ValueError(f"`model` {source.name!r} must be a model of the family ('relpos'), got {model_type!r}.")
    config, weights = RelPosConfig.from_pretrained(source.folder), SafetensorsWeights(source)
    made = llama_config(config)
    with torch.device("meta"):
        targets = LlamaForCausalLM._from_config(made).state_dict()
    if made.tie_word_embeddings:
        del targets[HEAD]
    for target, weight in targets.items():
        found = _source(target, config)
        if weights.shapes.get(found) != tuple(weight.shape):
            raise ValueError(
                f"{source.name!r} lacks {found!r}, or has it in another shape than its configuration says."
            )
        targets[target] = weight.to(weights.dtypes[found])
    made.dtype = config.dtype or next(iter(weights.dtypes.values()))
    made.save_pretrained(part)
    copy_generation_config(source, part)
    write_tokenizer(source, part)
    write_weights(part, targets, lambda target: _weight(target, config, weights))


def llama_config(config: RelPosConfig) -> LlamaConfig:
    """The configuration of a Llama that computes the same; raises `ValueError` if there is none."""
    rope_parameters = dict(getattr(config, "rope_parameters", None) or {})
    found = {name: getattr(config, name, None) for name in LLAMA}
    required = LLAMA | {"attention_out_bias": config.attention_bias}
    found["attention_out_bias"] = config.attention_out_bias
    if {*config.pos_embedding_type.split("/")} != {"rotary"}:
        raise ValueError(f"`pos_embedding_type` must be 'rotary' for a Llama, got {config.pos_embedding_type!r}.")
    wrong = {name: value for name, value in required.items() if found[name] != value}
    for name, value in wrong.items():
        flags = "" if config.imported_from else f" (to train one: {_training_flags(wrong)})"
        raise ValueError(f"`{name}` must be {value!r} for a Llama, got {found[name]!r}{flags}.")
    if (partial := rope_parameters.pop("partial_rotary_factor", 1.0)) != 1:
        raise ValueError(f"`partial_rotary_factor` must be 1 for a Llama, got {partial!r}.")
    if rope_parameters["rope_type"] not in ROPE_TYPES:
        rope_type = rope_parameters["rope_type"]
        raise ValueError(
            f"`rope_parameters` 'rope_type' must be one of {list(ROPE_TYPES)} for a Llama, got {rope_type!r}."
        )
    fields = {name: getattr(config, name) for name in (*LLAMA_SAME, "attention_bias", "mlp_bias")}
    # a Llama has no multiplier: it goes into the embeddings, which are no longer those of the head then
    is_tied = config.tie_word_embeddings and config.embedding_multiplier == 1
    fields |= {"rope_parameters": rope_parameters, "tie_word_embeddings": is_tied}
    made = LlamaConfig(**fields)
    made.architectures = [LlamaForCausalLM.__name__]
    return made


def _training_flags(fields: Mapping[str, Any]) -> str:
    """The commands that give a new model these fields."""
    given = {name: json.dumps(value).strip('"') for name, value in fields.items() if name != "sliding_window"}
    overrides = ",".join(f"{name}={value}" for name, value in given.items())
    words = [f"`hf-relpos train --config_overrides {overrides}`"] if given else []
    words += ["`hf-relpos train` without --sliding_window"] if "sliding_window" in fields else []
    return " and ".join(words)


def _source(target: str, config: RelPosConfig) -> str:
    """The name of the weight that one of a Llama is made of."""
    return EMBEDDINGS if target == HEAD and config.tie_word_embeddings else target


def _weight(target: str, config: RelPosConfig, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A weight of a Llama, made of those of a model of the family."""
    weight = weights[_source(target, config)]
    return weight * config.embedding_multiplier if target == EMBEDDINGS and config.embedding_multiplier != 1 else weight
