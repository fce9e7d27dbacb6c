"""Causal language models whose position scheme is one config field, `pos_embedding_type`.

Importing the package registers the family with the Auto classes of transformers.
"""

import transformers

from .configuration_relpos import MODEL_SIZES, RelPosConfig
from .modeling_relpos import (
    RelPosForCausalLM,
    RelPosForQuestionAnswering,
    RelPosForSequenceClassification,
    RelPosForTokenClassification,
    RelPosModel,
    RelPosPreTrainedModel,
)
from .position_base import PositionEmbedding, Positions, register_position_embedding
from .positions import list_position_embeddings
from .sharing_relpos import AUTO_MAP


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
    "register_position_embedding",
]


def _register() -> None:
    for auto_class, reference in AUTO_MAP.items():
        registered = globals()[reference.rpartition(".")[2]]
        if auto_class == "AutoConfig":
            transformers.AutoConfig.register(RelPosConfig.model_type, registered, exist_ok=True)
        else:
            getattr(transformers, auto_class).register(RelPosConfig, registered, exist_ok=True)


_register()
