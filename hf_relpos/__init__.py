"""Causal language models whose position scheme is one config field, `pos_embedding_type`.

Importing the package registers the family with the Auto classes of transformers.
"""

from typing import Any

import transformers

from .model.configuration_relpos import MODEL_SIZES, RelPosConfig
from .model.modeling_relpos import (
    RelPosForCausalLM,
    RelPosForQuestionAnswering,
    RelPosForSequenceClassification,
    RelPosForTokenClassification,
    RelPosModel,
    RelPosPreTrainedModel,
)
from .model.saved_code import AUTO_MAP
from .model.scheme_base import PositionEmbedding, Positions, register_position_embedding
from .model.scheme_registry import list_position_embeddings


__version__ = "0.1.0"

__all__ = [
    "MODEL_SIZES",
    "PositionEmbedding",
    "Positions",
    "RelPosConfig",
    "RelPosForCausalLM",
    "RelPosForQuestionAnswering",
    "RelPosForSequenceClassification",
    "RelPosForTokenClassification",
    "RelPosModel",
    "RelPosPreTrainedModel",
    "list_position_embeddings",
    "push_model",
    "register_position_embedding",
]


def push_model(model: RelPosPreTrainedModel, repo_id: str, **kwargs: Any) -> Any:
    """What `model.push_to_hub` does: `hf_relpos.hub.push.push_model`, loaded when it is needed."""
    from .hub.push import push_model as push

    return push(model, repo_id, **kwargs)


def _register() -> None:
    for auto_class, reference in AUTO_MAP.items():
        registered = globals()[reference.rpartition(".")[2]]
        if auto_class == "AutoConfig":
            transformers.AutoConfig.register(RelPosConfig.model_type, registered, exist_ok=True)
        else:
            getattr(transformers, auto_class).register(RelPosConfig, registered, exist_ok=True)


_register()
