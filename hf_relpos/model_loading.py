"""Saved models and their tokenizers, with one clear error for a folder or repository that holds none.

Nothing here imports the data libraries: loading a model needs torch and transformers only.
"""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoTokenizer

from .model.configuration_relpos import RelPosConfig
from .model.modeling_relpos import RelPosForCausalLM


def load_model(name: str, model_class: Any, **kwargs: Any) -> Any:
    """`model_class.from_pretrained(name)`, with one clear error for what is not a model.

    Raises:
        ValueError: if the folder or repository is missing, holds no model, or one that does not fit.
    """
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"`model_name_or_path` {name!r} is not a model: it holds no config.json.")
    if not path.is_dir() and (path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ValueError(f"`model_name_or_path` {name!r} is not a folder.")
    if model_class is RelPosForCausalLM:
        try:
            saved, _ = RelPosConfig.get_config_dict(name)
        except OSError as error:
            raise ValueError(f"`model_name_or_path` {name!r} cannot be loaded: {error}") from error
        if saved.get("model_type") != RelPosConfig.model_type:
            raise ValueError(
                f"`model_name_or_path` {name!r} must be a model of the family ('relpos'), "
                f"got model_type {saved.get('model_type')!r}."
            )
    try:
        model, report = model_class.from_pretrained(name, output_loading_info=True, **kwargs)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise ValueError(f"`model_name_or_path` {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    wrong = sorted(report["missing_keys"])
    if isinstance(model, RelPosForCausalLM):
        wrong += sorted(report["unexpected_keys"])
    if wrong:
        raise ValueError(f"`model_name_or_path` {name!r} holds other weights than its configuration says: {wrong[0]}.")
    return model


def load_model_tokenizer(name: str, model: Any) -> Any:
    """The tokenizer of `model`, by its name; raises `ValueError` if there is none or it has more entries."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer can be loaded from {name!r}.") from error
    if len(tokenizer) > model.config.vocab_size:
        check_vocab_size(tokenizer, model.config.vocab_size)
    return tokenizer


def check_vocab_size(tokenizer: Any, vocab_size: int) -> None:
    """Raises `ValueError` unless the tokenizer has exactly `vocab_size` entries."""
    if len(tokenizer) != vocab_size:
        raise ValueError(f"`vocab_size` of the model is {vocab_size}, but the tokenizer has {len(tokenizer)} entries.")
