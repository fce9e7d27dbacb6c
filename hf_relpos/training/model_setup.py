"""The model of a run: a new one from flags, or a saved one."""

from contextlib import suppress
from typing import Any

import torch
from transformers import set_seed

from ..cli import nearest
from ..environment import is_first_process
from ..file_reading import parse_json as strict_json
from ..file_reading import parse_yaml
from ..model.configuration_relpos import MODEL_SIZES, RelPosConfig
from ..model.modeling_relpos import RelPosForCausalLM
from ..model_loading import check_folder, check_size, check_vocab_size, load_model, load_model_tokenizer
from ..pretrained.importing import describe_import, import_model, is_foreign
from ..special_tokens import document_end
from ..tasks.arguments import DataArguments
from .model_arguments import ModelArguments, SavedModelArguments


def new_config(model_args: ModelArguments, block_size: int) -> RelPosConfig:
    """The configuration of a new model.

    Raises:
        ValueError: for a field that is unknown, unreadable or out of range.
    """
    fields = _parse_overrides(model_args.config_overrides)
    for name in ("pos_embedding_type", "vocab_size", "max_position_embeddings", "sliding_window"):
        if getattr(model_args, name) is not None:
            fields[name] = getattr(model_args, name)
    for name in ("pos_embedding_kwargs", "rope_parameters"):
        if getattr(model_args, name) is not None:
            fields[name] = parse_json(name, getattr(model_args, name))
    if model_args.position_start_augmentation:
        fields["position_start_augmentation"] = True
    if model_args.position_sampling is not None:
        fields["position_sampling"] = _sampling(model_args)
    size = model_args.model_size or "xsmall"
    if model_args.layer_types is not None:
        num_layers = fields.get("num_hidden_layers", MODEL_SIZES.get(size, (0,))[0])
        fields["layer_types"] = repeat_layer_types(model_args.layer_types, num_layers)
    config = RelPosConfig.from_size(size, train_length=block_size, **fields)
    if config.max_positions is None:
        config.max_position_embeddings = max(config.max_position_embeddings, block_size)
    elif not draws_positions(config) and "max_position_embeddings" not in fields:
        config.max_position_embeddings = block_size  # a larger table would have rows that no training step reaches
    return config


def parse_json(name: str, text: str | None) -> dict[str, Any]:
    """The dictionary that a flag holds as JSON, empty without the flag; raises `ValueError` if it holds none."""
    value = strict_json(text, f"`{name}` must be JSON: {text!r}") if text is not None else {}
    if not isinstance(value, dict):
        raise ValueError(f"`{name}` must be a dictionary, got {text!r}.")
    return value


def repeat_layer_types(pattern: str, num_layers: int) -> list[str]:
    """'sliding/full' → `layer_types` of a configuration, the pattern repeated over the layers."""
    parts = [f"{part.removesuffix('_attention')}_attention" for part in pattern.split("/")]
    return [parts[index % len(parts)] for index in range(num_layers)]


def draws_positions(config: RelPosConfig) -> bool:
    """Whether training gives out positions past the length of a sequence, up to `max_position_embeddings`."""
    return config.position_start_augmentation or config.position_sampling is not None


def _sampling(model_args: SavedModelArguments) -> str | None:
    return None if model_args.position_sampling == "none" else model_args.position_sampling


def new_model(config: RelPosConfig, seed: int, attn_implementation: str | None = None) -> RelPosForCausalLM:
    """A model with new weights; for one seed, those that all schemes have are the same whatever the scheme."""
    check_size(config)
    set_seed(seed)
    model = RelPosForCausalLM._from_config(config, attn_implementation=attn_implementation)
    fields = {name: value for name, value in config.to_dict().items() if name != "rope_parameters"}
    plain = RelPosConfig.from_dict(
        {**fields, "pos_embedding_type": "none", "pos_embedding_kwargs": None, "position_gates": None}
    )
    set_seed(seed)
    model.load_state_dict(RelPosForCausalLM(plain).state_dict(), strict=False)
    return model


def _parse_overrides(overrides: str | None) -> dict[str, Any]:
    elsewhere = {"train_length", "pad_token_id", "bos_token_id", "eos_token_id"}  # set by the run and the tokenizer
    allowed = set(RelPosConfig.__annotations__) - elsewhere - set(ModelArguments.__dataclass_fields__)
    fields = {}
    for item in overrides.split(",") if overrides else []:
        name, equals, value = item.partition("=")
        if not equals or name not in allowed:
            hint = nearest(name, allowed)
            raise ValueError(f"`config_overrides` must be 'field=value,..' of {sorted(allowed)}, got {item!r}{hint}.")
        if name in fields:
            raise ValueError(f"`config_overrides` must give each field once, got {name!r} twice.")
        fields[name] = parse_yaml(value, f"`config_overrides` {item!r}")
        if isinstance(fields[name], str):
            with suppress(ValueError):  # YAML takes 1e-3 for text
                fields[name] = float(fields[name])
    return fields


def load_saved(model_args: SavedModelArguments, data_args: DataArguments) -> tuple[RelPosForCausalLM, Any]:
    """The model and tokenizer of `model_name_or_path`; a model of another family is imported.

    Raises:
        ValueError: if it is no model or cannot be imported, or if its scheme or vocabulary is another than asked for.
    """
    name = model_args.model_name_or_path
    others = ("model_size", "vocab_size", "pos_embedding_kwargs", "max_position_embeddings", "config_overrides")
    for other in (*others, "layer_types", "sliding_window", "rope_parameters"):
        if getattr(model_args, other, None) is not None:
            raise ValueError(f"`{other}` is that of the saved model: it cannot be given with `model_name_or_path`.")
    kwargs = {
        "pos_embedding_type": model_args.pos_embedding_type,
        "attn_implementation": model_args.attn_implementation,
    }
    kwargs = {key: value for key, value in kwargs.items() if value is not None}
    if getattr(model_args, "position_start_augmentation", False):
        kwargs["position_start_augmentation"] = True
    if model_args.position_sampling is not None:
        kwargs["position_sampling"] = _sampling(model_args)
    check_folder(name)  # before anything asks the Hub
    if is_foreign(name):
        model = import_model(name, **kwargs)
        if is_first_process():
            print(describe_import(model.config, name))
    else:
        model = load_model(name, RelPosForCausalLM, **kwargs)
    RelPosConfig.from_dict(model.config.to_dict())  # fields that are set on a saved one are not checked otherwise
    tokenizer = load_model_tokenizer(data_args.tokenizer_name or name, model)
    if model.config.imported_from is None:  # other families have rows of embeddings that no token uses
        check_vocab_size(tokenizer, model.config.vocab_size)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name!r} has no end-of-sequence token to separate documents.")
    end = document_end(tokenizer)
    if end != tokenizer.eos_token_id and is_first_process():
        end, turn_end = tokenizer.convert_ids_to_tokens(end), tokenizer.eos_token
        print(f"documents end in {end!r}, as in pretraining; {turn_end!r} ends the turns of chats")
    return model, tokenizer


def extend_learned_positions(model: RelPosForCausalLM, length: int) -> None:
    """Lengthens the learned tables of `model` to `length` rows, in place: new row p is old row p mod the old length.

    Copies of the trained rows keep neighbouring positions apart from the first step on, which fresh rows do not
    (Beltagy et al. 2020, arXiv 2004.05150, section 5).
    """
    for module in list(model.model.position_embeddings.values()):
        table = getattr(module, "embedding", None)
        if table is not None and table.num_embeddings < length:
            rows = torch.arange(length, device=table.weight.device) % table.num_embeddings
            table.weight = torch.nn.Parameter(table.weight.detach()[rows])
            table.num_embeddings = length
    model.config.max_position_embeddings = length
