"""Tables of the bias in compiled graphs without gradients: an operator that computes a table once, and again when the
parameters have other numbers.

Shape letters: H query heads, L length of a table.
"""

import zlib
from itertools import chain, count
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn


# The same code may be loaded from several saved folders beside the package: each copy has an operator of its own
_NAMESPACE = f"relpos_{zlib.crc32(__name__.encode()):08x}"
# an operator takes no module: names, which no two modules of a process share
_NUMBERS = count()
_SCHEMES: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
# scheme → its parameters at one time, and its table
_TABLES: WeakKeyDictionary[nn.Module, tuple[list[torch.Tensor], torch.Tensor]] = WeakKeyDictionary()


def name_scheme(scheme: nn.Module) -> str:
    """→ the name of a scheme for `kept_table`."""
    name = str(next(_NUMBERS))
    _SCHEMES[name] = scheme
    return name


def can_keep_tables(device: torch.device) -> bool:
    """Whether this is the place for `kept_table`: on a GPU, a graph that is replayed would not look at the numbers."""
    if not torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting():
        return False
    return device.type == "cpu" and not torch.is_grad_enabled()


def kept_table(scheme: Any, length: int) -> torch.Tensor:
    """→ (H, length) fp32, what `distance_bias` of a scheme returns for the distances 0..length−1."""
    parameters = [*scheme.parameters(), *scheme.buffers()]
    return _kept_table(parameters, scheme.table_name, scheme.num_table_heads, length)


@torch.library.custom_op(f"{_NAMESPACE}::kept_table", mutates_args=())
def _kept_table(parameters: list[torch.Tensor], name: str, num_heads: int, length: int) -> torch.Tensor:
    scheme = _SCHEMES[name]
    numbers, table = _TABLES.get(scheme, ([], None))
    if table is None or table.shape[1] < length or not _are_equal(parameters, numbers):
        names = (name for name, _ in chain(scheme.named_parameters(), scheme.named_buffers()))
        distance = torch.arange(max(64, 2 ** (length - 1).bit_length()))  # room for what comes
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            given = dict(zip(names, parameters, strict=True))
            table = torch.func.functional_call(scheme, given, ("distance_bias", distance)).float()
        _TABLES[scheme] = [x.detach().clone() for x in parameters], table
    return table[:, :length].clone()


@_kept_table.register_fake
def _(parameters: list[torch.Tensor], name: str, num_heads: int, length: int) -> torch.Tensor:
    return torch.empty(num_heads, length)


def _are_equal(parameters: list[torch.Tensor], numbers: list[torch.Tensor]) -> bool:
    if len(parameters) != len(numbers) or any(x.dtype != y.dtype for x, y in zip(parameters, numbers)):
        return False
    return all(map(torch.equal, parameters, numbers))
