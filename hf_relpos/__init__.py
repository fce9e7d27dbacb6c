"""Causal language models whose position scheme is one config field, `pos_embedding_type`.

Importing the package registers the family with the Auto classes of transformers.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .model.configuration_relpos import MODEL_SIZES, RelPosConfig
    from .model.modeling_relpos import (
        RelPosForCausalLM,
        RelPosForQuestionAnswering,
        RelPosForSequenceClassification,
        RelPosForTokenClassification,
        RelPosModel,
        RelPosPreTrainedModel,
    )
    from .model.scheme_base import PositionEmbedding, Positions, register_position_embedding
    from .model.scheme_registry import list_position_embeddings

__version__ = "0.2.0"

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
    "check_position_embedding",
    "export_model",
    "import_model",
    "import_scheme_file",
    "list_position_embeddings",
    "push_model",
    "register_position_embedding",
]

# public name → the module of `hf_relpos.model` that defines it; the models' names begin with RelPos
_MODULES = {
    "MODEL_SIZES": "configuration_relpos",
    "RelPosConfig": "configuration_relpos",
    "PositionEmbedding": "scheme_base",
    "Positions": "scheme_base",
    "register_position_embedding": "scheme_base",
    "list_position_embeddings": "scheme_registry",
}


def push_model(model: "RelPosPreTrainedModel", repo_id: str, **kwargs: Any) -> Any:
    """What `model.push_to_hub` does: `hf_relpos.hub.push.push_model`, loaded when it is needed."""
    from .hub.push import push_model as push

    return push(model, repo_id, **kwargs)


def import_model(model: Any, **kwargs: Any) -> "RelPosForCausalLM":
    """`hf_relpos.pretrained.importing.import_model`, loaded when it is needed: a pretrained model of another family."""
    from .pretrained.importing import import_model as load

    return load(model, **kwargs)


def export_model(model: "RelPosForCausalLM") -> Any:
    """`hf_relpos.pretrained.exporting.export_model`, loaded when it is needed: a model as a `LlamaForCausalLM`."""
    from .pretrained.exporting import export_model as export

    return export(model)


def import_scheme_file(path: Any) -> Any:
    """`hf_relpos.scheme_files.import_scheme_file`, loaded when it is needed: registers the schemes of a Python file."""
    from .scheme_files import import_scheme_file as execute

    return execute(path)


def check_position_embedding(pos_embedding_type: str, **kwargs: Any) -> Any:
    """`hf_relpos.scheme_check.check_position_embedding`, loaded when it is needed: tries a scheme on a tiny model."""
    from .scheme_check import check_position_embedding as check

    return check(pos_embedding_type, **kwargs)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".model.{_MODULES.get(name, 'modeling_relpos')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _runs_the_command() -> bool:
    """Whether this process is the program `hf-relpos` or `python -m hf_relpos`."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what Python puts there while it looks for the module
        return ("-m", __name__) in zip(sys.orig_argv, sys.orig_argv[1:])
    return program.replace("\\", "/").rpartition("/")[2].startswith("hf-relpos")


# torch and transformers take seconds to import, which `hf-relpos --help` need not wait for: each sub-command imports
# the modules that it uses, and with the first of `hf_relpos.model` the family is registered
if not _runs_the_command():
    import_module(".model", __name__)
