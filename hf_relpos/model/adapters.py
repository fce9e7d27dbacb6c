"""PEFT's defaults for the family: where `target_modules` is left out, it looks the model's type up in tables."""

import sys
from typing import Any


# the type whose names of projections and norms are those of the family
MODEL_TYPE_LIKE = "llama"


def enter_adapter_tables(model_type: str) -> None:
    """Enters a model type into the tables of PEFT, if it is imported, beside the type that has its modules' names."""
    tables = getattr(sys.modules.get("peft.utils.constants"), "__dict__", {})
    for name, table in list(tables.items()):
        if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) and MODEL_TYPE_LIKE in table:
            table.setdefault(model_type, table[MODEL_TYPE_LIKE])


class KnownToAdapters:
    """Mixin for a `PreTrainedConfig`: PEFT takes its dictionary just before it looks the type up, whenever PEFT itself
    was imported."""

    model_type: str

    def to_dict(self) -> dict[str, Any]:
        enter_adapter_tables(self.model_type)
        return super().to_dict()
