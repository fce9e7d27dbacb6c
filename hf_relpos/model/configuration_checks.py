"""What a configuration refuses: keywords that are no field, and values out of range."""

import difflib
import inspect
import math
from dataclasses import fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import logging

from .position_augmentation import SAMPLINGS
from .scheme_base import POSITION_EMBEDDINGS, StartGate
from .scheme_registry import position_embedding_classes
from .scheme_rotary import RotaryEmbedding


logger = logging.get_logger(__name__)

# keywords of the rotation that Llama and its kin take beside `rope_parameters`
ROPE_KEYWORDS = ("rope_scaling", "rope_theta", "partial_rotary_factor")
# what transformers and its servers store in configurations of any model
FOREIGN_KEYWORDS = {"auto_map", "quantization_config", "model_type", "torch_dtype", "num_labels", "name_or_path"}
FOREIGN_KEYWORDS |= {"output_attentions", "attn_implementation", "experts_implementation", "per_layer_config"}
CHOICES = {
    "initializer": ("fan_in", "normal"),
    "norm_type": ("rms_norm", "layer_norm"),
    "norm_placement": ("before", "after"),
    "qk_norm": (None, "head", "layer"),
}
FLAGS = ("position_start_augmentation", "use_cache", "tie_word_embeddings", "attention_bias", "attention_out_bias")
FLAGS += ("use_gated_mlp", "mlp_bias", "norm_bias", "embed_norm", "use_parallel_residual")


def check_keywords(cls: type[PreTrainedConfig], keywords: dict[str, Any]) -> None:
    """Refuses keywords that were meant for a field, and warns of those that nobody here reads."""
    generation = GenerationConfig._get_default_generation_params()
    for name in keywords:
        refuse_near_miss(cls, name)
        if name in generation:
            logger.warning(f"`{name}` is not kept in a configuration: it belongs in `generation_config`.")
        elif not _is_known(cls, name):
            warn_of_unknown(cls, name)


def warn_of_unknown(cls: type[PreTrainedConfig], name: str) -> None:
    """Warns of a keyword that is kept though it is no field."""
    logger.warning(f"`{name}` is no field of {cls.__name__}: it is kept, and nothing reads it.")


def refuse_near_miss(cls: type[PreTrainedConfig], name: str, words: bool = True) -> None:
    """Raises `ValueError` for a keyword that is no field but resembles one.

    With `words` also for one that has some of a field's words and no other, such as "num_layers".
    """
    if isinstance(getattr(cls, name, None), property) and getattr(cls, name).fset is None:
        raise ValueError(f"`{name}` is no field of {cls.__name__}: it follows from the others.")
    if _is_known(cls, name) or name in GenerationConfig._get_default_generation_params():
        return
    own = [*own_fields(cls), "rope_parameters", "layer_types", *ROPE_KEYWORDS]
    near = difflib.get_close_matches(name.lower(), [*own, *(item.name for item in fields(cls))], n=1, cutoff=0.8)
    near += [field for field in own if words and {*name.split("_")} < {*field.split("_")}]
    if near:
        raise ValueError(f"`{name}` is no field of {cls.__name__}: did you mean `{near[0]}`?")


def own_fields(cls: type[PreTrainedConfig]) -> list[str]:
    """The fields that a configuration has beside those of every model of transformers."""
    own = [base for base in cls.__mro__ if issubclass(base, PreTrainedConfig) and base is not PreTrainedConfig]
    return [name for base in own for name in inspect.get_annotations(base)]


def constructor_fields(cls: type[PreTrainedConfig]) -> list[str]:
    """The fields that the constructor must see where they replace saved ones. A model that is cut short keeps the
    schemes of its layers, and `initializer` says of a file which version wrote it: these two are set afterwards."""
    return [name for name in (*own_fields(cls), "layer_types") if name not in ("num_hidden_layers", "initializer")]


def drop_options_of_others(saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Drops from saved fields the options that the scheme does not take which is given in the place of theirs."""
    scheme = given.get("pos_embedding_type")
    if scheme is None or scheme == saved.get("pos_embedding_type"):
        return
    classes = position_embedding_classes(scheme)
    allowed = {option for cls in classes.values() for option in cls.defaults}
    options, gates = saved.get("pos_embedding_kwargs") or {}, saved.get("position_gates") or ()
    saved["pos_embedding_kwargs"] = {name: value for name, value in options.items() if name in allowed}
    saved["position_gates"] = [name for name in gates if name in classes] or None
    if not any(cls.uses_rope_parameters for cls in classes.values()):
        saved.pop("rope_parameters", None)


def is_near_miss(cls: type[PreTrainedConfig], name: str) -> bool:
    """Whether `refuse_near_miss` refuses it."""
    try:
        refuse_near_miss(cls, name)
    except ValueError:
        return not isinstance(getattr(cls, name, None), property)
    return False


def _is_known(cls: type[PreTrainedConfig], name: str) -> bool:
    """Whether a field, or what transformers stores beside the fields of any model."""
    names = {item.name for item in fields(cls)} | {"rope_parameters", "layer_types", *ROPE_KEYWORDS}
    return name in names or name in FOREIGN_KEYWORDS or name.startswith("_") or hasattr(cls, name)


def join_rope_keywords(pos_embedding_type: str, rope_parameters: dict | None, given: dict[str, Any]) -> dict | None:
    """→ `rope_parameters` with what was given as keywords; refuses two answers, and schemes that do not rotate."""
    given = {name: value for name, value in given.items() if value is not None}
    scaling = given.pop("rope_scaling", None)
    parts = {
        "rope_parameters": rope_parameters,
        "rope_scaling": scaling,
        **{name: {name: given[name]} for name in given},
    }
    joined: dict[str, tuple[str, Any]] = {}
    for field, part in parts.items():
        if part is None:
            continue
        if not isinstance(part, dict):
            raise ValueError(f"`{field}` must be a dictionary, got {part!r}.")
        classes = position_embedding_classes(pos_embedding_type)
        if not any(cls.uses_rope_parameters for cls in classes.values()):
            users = [name for name, cls in POSITION_EMBEDDINGS.items() if cls.uses_rope_parameters]
            raise ValueError(f"`{field}` is for pos_embedding_type {users}, got it with {pos_embedding_type!r}.")
        for name, value in part.items():
            name = "rope_type" if name == "type" else name  # its name in older files
            other, earlier = joined.setdefault(name, (field, value))
            if earlier is not value and earlier != value:  # NaN differs from itself, and is refused below
                raise ValueError(f"`{other}` and `{field}` disagree about {name!r}: {earlier!r} and {value!r}.")
    return {name: value for name, (_, value) in joined.items()} if joined or rope_parameters is not None else None


def replaced_rotation(saved: dict[str, Any] | None, given: dict[str, Any]) -> Any:
    """→ `rope_parameters` where keywords of the rotation replace what is saved. The weights are for its base and its
    share of the channels: another rotation has them too, unless it says so itself."""
    rotation = given.get("rope_parameters")
    if not isinstance(rotation, (dict, type(None))):
        return rotation  # which is refused
    is_other = rotation is not None or given.get("rope_scaling") is not None
    kept = RotaryEmbedding.defaults if is_other else saved or {}
    rest = {name: value for name, value in (saved or {}).items() if name in kept and given.get(name) is None}
    return {**rest, **(rotation or {})} or None


def check_sizes(config: Any) -> None:
    """Raises `ValueError` for a number of something that is no integer of at least 1."""
    optional = ("intermediate_size", "num_key_value_heads", "head_dim", "train_length", "sliding_window")
    required = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    for name in required + optional:
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_heads(config: Any) -> None:
    """Raises `ValueError` for heads that cannot be laid out."""
    num_heads, width = config.num_attention_heads, config.hidden_size
    if config.head_dim * num_heads != width and width % num_heads:
        raise ValueError(f"`num_attention_heads` must divide `hidden_size` {width}, got {num_heads}.")
    if num_heads % config.num_key_value_heads:
        raise ValueError(
            f"`num_key_value_heads` must divide `num_attention_heads` {num_heads}, got {config.num_key_value_heads}."
        )


def check_gates(config: Any) -> None:
    """Raises `ValueError` for gates of what is no scheme of the model, or of one that has nothing to gate."""
    gates = config.position_gates
    if gates is None:
        return
    classes = position_embedding_classes(config.pos_embedding_type)
    allowed = [name for name, cls in classes.items() if StartGate.fits(cls)]
    if not isinstance(gates, (list, tuple)) or not gates or len({*gates}) < len(gates) or not {*gates} <= {*allowed}:
        raise ValueError(
            f"`position_gates` must be None or list some of {allowed}, the schemes of {config.pos_embedding_type!r} "
            f"that add something from the first step on, got {gates!r}."
        )


def check_ranges(config: Any) -> None:
    """Raises `ValueError` for a number out of range, a word that is no choice, and what excludes each other."""
    for name in ("hidden_dropout", "attention_dropout"):
        if not isinstance(getattr(config, name), (int, float)) or not 0 <= getattr(config, name) < 1:
            raise ValueError(f"`{name}` must lie in [0, 1), got {getattr(config, name)!r}.")
    if config.hidden_act not in ACT2FN:
        raise ValueError(f"`hidden_act` must be one of {sorted(ACT2FN)}, got {config.hidden_act!r}.")
    if config.pad_token_id is not None and not 0 <= config.pad_token_id < config.vocab_size:
        raise ValueError(f"`pad_token_id` must be below `vocab_size` {config.vocab_size}, got {config.pad_token_id}.")
    for name in ("initializer_range", "rms_norm_eps", "layer_norm_eps", "embedding_multiplier"):
        if not isinstance(getattr(config, name), (int, float)) or not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"`{name}` must be a number of at least 0, got {getattr(config, name)!r}.")
    for name, allowed in CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ValueError(f"`{name}` must be one of {list(allowed)}, got {getattr(config, name)!r}.")
    for name in FLAGS:
        if not isinstance(getattr(config, name), bool):
            raise ValueError(f"`{name}` must be true or false, got {getattr(config, name)!r}.")
    if config.use_parallel_residual and config.norm_placement == "after":
        raise ValueError("`norm_placement` must be 'before' with `use_parallel_residual`, got 'after'.")
    if config.position_sampling not in (None, *SAMPLINGS):
        raise ValueError(
            f"`position_sampling` must be None or one of {list(SAMPLINGS)}, got {config.position_sampling!r}."
        )
    if config.position_sampling and config.position_start_augmentation:
        raise ValueError(
            "`position_sampling` must be None with `position_start_augmentation`, which has starts of its own, "
            f"got {config.position_sampling!r}."
        )
    if not isinstance(config.imported_from, (dict, type(None))):
        raise ValueError(f"`imported_from` must be a dictionary, got {config.imported_from!r}.")
