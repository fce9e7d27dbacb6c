"""Causal language models whose position scheme is one config field, `pos_embedding_type`.

Importing the package registers the family with the Auto classes of transformers.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from transformers.models.auto import modeling_auto

from .configuration_relpos import MODEL_SIZES, RelPosConfig
from .modeling_relpos import (
    RelPosForCausalLM,
    RelPosForSequenceClassification,
    RelPosForTokenClassification,
    RelPosModel,
    RelPosPreTrainedModel,
)
from .position_base import PositionEmbedding, Positions, register_position_embedding
from .positions import list_position_embeddings


__version__ = "0.1.0"

__all__ = [
    "MODEL_SIZES",
    "PositionEmbedding",
    "Positions",
    "RelPosConfig",
    "RelPosForCausalLM",
    "RelPosForSequenceClassification",
    "RelPosForTokenClassification",
    "RelPosModel",
    "RelPosPreTrainedModel",
    "list_position_embeddings",
    "register_position_embedding",
]


def _register() -> None:
    AutoConfig.register(RelPosConfig.model_type, RelPosConfig, exist_ok=True)
    # Pipelines and the Trainer's label smoothing look a class up by name in these tables: a name that is missing there
    # is trained on labels that are not shifted
    for auto_class, model_class, names in (
        (AutoModel, RelPosModel, modeling_auto.MODEL_MAPPING_NAMES),
        (AutoModelForCausalLM, RelPosForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        (
            AutoModelForSequenceClassification,
            RelPosForSequenceClassification,
            modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        ),
        (
            AutoModelForTokenClassification,
            RelPosForTokenClassification,
            modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        ),
    ):
        auto_class.register(RelPosConfig, model_class, exist_ok=True)
        names[RelPosConfig.model_type] = model_class.__name__


_register()
