"""The models. Importing any module of this package registers the family with the Auto classes of transformers.

A saved folder carries the modules and not this file: there, `auto_map` in config.json says which class is where.
"""

from importlib import import_module

import transformers

from .configuration_relpos import RelPosConfig
from .saved_code import AUTO_MAP


for _auto_class, _reference in AUTO_MAP.items():
    _module, _, _name = _reference.partition(".")
    _key = RelPosConfig.model_type if _auto_class == "AutoConfig" else RelPosConfig
    _registered = getattr(import_module(f".{_module}", __name__), _name)
    getattr(transformers, _auto_class).register(_key, _registered, exist_ok=True)
