"""What makes a saved folder load anywhere: it carries the code of the family and says which class is where.

transformers finds that code by the class of the saved object, which is another one under FSDP2, and notes that class
alone. Here the files and the names are constants.
"""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from .configuration_relpos import RelPosConfig
from .scheme_registry import position_embedding_classes


logger = logging.get_logger(__name__)

# Auto class → the file and class that it stands for
AUTO_MAP = {
    "AutoConfig": "configuration_relpos.RelPosConfig",
    "AutoModel": "modeling_relpos.RelPosModel",
    "AutoModelForCausalLM": "modeling_relpos.RelPosForCausalLM",
    "AutoModelForSequenceClassification": "modeling_relpos.RelPosForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_relpos.RelPosForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_relpos.RelPosForQuestionAnswering",
}

# Pipelines and the Trainer's label smoothing look a class up by name in these tables: a name that is missing there is
# trained on labels that are not shifted
for _auto_class, _names in {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}.items():
    _names[RelPosConfig.model_type] = AUTO_MAP[_auto_class].rpartition(".")[2]


def code_files() -> list[Path]:
    """The files that a folder needs to load without the package: that of the models and all that it imports."""
    models = Path(__file__).parent / "modeling_relpos.py"
    return [models, *sorted(Path(file) for file in get_relative_import_files(models))]


def foreign_schemes(pos_embedding_type: str) -> dict[str, str]:
    """Name → module, for the schemes whose code a saved folder does not carry."""
    found = {}
    for name, scheme in position_embedding_classes(pos_embedding_type).items():
        source = getattr(sys.modules.get(scheme.__module__), "__file__", None)
        if source is None or Path(source).parent != Path(__file__).parent:
            found[name] = scheme.__module__
    return found


class SelfContainedModel:
    """Mixin for a `PreTrainedModel`: every way to save or push it takes the code along."""

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Nothing to do: `save_pretrained` writes the code and the names of all Auto classes."""

    def save_pretrained(self, save_directory: str | os.PathLike, is_main_process: bool = True, **kwargs: Any) -> None:
        """As in transformers; the folder also gets the code of the family, so that it loads without the package."""
        folder, adapter_only = Path(save_directory), getattr(self, "_hf_peft_config_loaded", False)
        if is_main_process and not adapter_only and not folder.is_file():
            self.config.auto_map = dict(AUTO_MAP)
            folder.mkdir(parents=True, exist_ok=True)
            for file in code_files():
                part = folder / f"{file.name}.{os.getpid()}.part"
                shutil.copyfile(file, part)
                os.replace(part, folder / file.name)
            self._warn_of_foreign_schemes(folder)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:
        """As in transformers, with its arguments; where the package `hf_relpos` is imported, the repository also gets the
        card and what the folder that the model was loaded from tells of it."""
        package = sys.modules.get("hf_relpos")
        if package is None:
            return super().push_to_hub(repo_id, **kwargs)
        return package.push_model(self, repo_id, **kwargs)

    def _warn_of_foreign_schemes(self, folder: Path) -> None:
        for name, module in foreign_schemes(self.config.pos_embedding_type).items():
            logger.warning(
                f"The position embedding {name!r} is defined in {module!r}, which is not saved to {str(folder)!r}: "
                "import it before you load the model."
            )
