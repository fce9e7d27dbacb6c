"""Tables of the bias that outlive a forward without gradients: computed once, and again when the parameters have other
numbers. In compiled graphs an operator looks for that.

Shape letters: H query heads, L length of a table.
"""

import zlib
from collections.abc import Iterable
from itertools import chain, count
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from .functional_transforms import is_transformed


# The same code may be loaded from several saved folders beside the package: each copy has an operator of its own
_NAMESPACE = f"relpos_{zlib.crc32(__name__.encode()):08x}"
# attributes of every module, but whether it is trained
_INTERNAL = vars(nn.Module()).keys() - {"training"}


class Unkeepable(Exception):
    """A parameter whose numbers cannot be compared here: sharded, offloaded or of a kind of its own."""


class SchemeState:
    """What the hooks of some schemes read, as it is at one time: attributes, modules, parameters and their numbers.

    A version counter would not do for these: what writes to `parameter.data`, as merging an adapter does, leaves it.

    Args:
        schemes: the schemes.
        places: further dictionaries, each with a name in it, whose entries must stay the same objects.

    Raises:
        Unkeepable: for a parameter that is no plain tensor on a device.
    """

    def __init__(self, schemes: Iterable[nn.Module], places: Iterable[tuple[dict[str, Any], str]] = ()) -> None:
        self.places, self.dictionaries = [*places], []
        for part in (part for scheme in schemes for part in scheme.modules()):
            held = vars(part), part._modules, part._parameters, part._buffers
            self.dictionaries += held
            self.places += [(each, name) for each in held for name in each.keys() - _INTERNAL]
        self.sizes = [*map(len, self.dictionaries)]
        self.parts = [each[name] for each, name in self.places]
        tensors = [part for part in self.parts if isinstance(part, torch.Tensor)]
        if any(type(x) not in (torch.Tensor, nn.Parameter) or x.is_meta for x in tensors):
            raise Unkeepable
        self.on_cpu = [(x, x.detach().clone()) for x in tensors if x.is_cpu]
        devices = {x.device for x in tensors if not x.is_cpu}
        self.elsewhere = [[x for x in tensors if x.device == device] for device in devices]
        self.numbers = [_flat(found) for found in self.elsewhere]

    def is_unchanged(self) -> bool:
        """Whether all is as it was."""
        parts = [each.get(name) for each, name in self.places]
        if not all(map(is_, parts, self.parts)) or [*map(len, self.dictionaries)] != self.sizes:
            return False
        try:
            for x, numbers in self.on_cpu:
                if not torch.equal(x, numbers):
                    return False
            # one comparison for a device, which waits for it
            return all(torch.equal(_flat(found), numbers) for found, numbers in zip(self.elsewhere, self.numbers))
        except RuntimeError:  # of another dtype or on another device
            return False


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


# --- tables


# an operator takes no module: names, which no two modules of a process share
_NUMBERS = count()
_SCHEMES: WeakValueDictionary[str, nn.Module] = WeakValueDictionary()
_TABLES: WeakKeyDictionary[nn.Module, tuple[SchemeState, torch.Tensor]] = WeakKeyDictionary()


def name_scheme(scheme: nn.Module) -> str:
    """→ the name of a scheme for `kept_table`."""
    name = str(next(_NUMBERS))
    _SCHEMES[name] = scheme
    return name


def kept_table(scheme: Any, length: int, device: torch.device, is_step: bool = False) -> torch.Tensor | None:
    """→ (H, length) fp32, what `distance_bias` of a scheme returns for the distances 0..length−1; `None` where tables
    are not kept: beside gradients, on GPUs, where a graph that is replayed would not look at the numbers, and outside
    of graphs but in steps of a generation."""
    is_compiled = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
    if device.type != "cpu" or torch.is_grad_enabled() or not (is_compiled or is_step):
        return None
    if is_compiled:
        return _kept_table(_numbers(scheme), scheme.table_name, scheme.num_table_heads, length)
    if is_transformed() or torch.jit.is_tracing():
        return None
    try:
        return _read(scheme, length)
    except Unkeepable:
        return None


def _numbers(scheme: nn.Module) -> list[torch.Tensor]:
    return [*scheme.parameters(), *scheme.buffers()]


@torch.library.custom_op(f"{_NAMESPACE}::kept_table", mutates_args=())
def _kept_table(numbers: list[torch.Tensor], name: str, num_heads: int, length: int) -> torch.Tensor:
    scheme = _SCHEMES[name]
    held = _numbers(scheme)
    try:
        if all(x is y or torch.equal(x, y) for x, y in zip(numbers, held, strict=True)):
            return _read(scheme, length).clone()
    except (RuntimeError, ValueError, Unkeepable):
        pass  # the graph was given numbers that are not those of the scheme, as by `torch.func.functional_call`
    return _compute(scheme, numbers, length)


@_kept_table.register_fake
def _(numbers: list[torch.Tensor], name: str, num_heads: int, length: int) -> torch.Tensor:
    return torch.empty(num_heads, length)


def _read(scheme: nn.Module, length: int) -> torch.Tensor:
    """→ a part of the table that is kept."""
    state, table = _TABLES.get(scheme, (None, None))
    if table is None or table.shape[1] < length or not state.is_unchanged():
        state = SchemeState([scheme])
        table = _compute(scheme, _numbers(scheme), max(64, 2 ** (length - 1).bit_length()))  # room for what comes
        _TABLES[scheme] = state, table
    return table[:, :length]


def _compute(scheme: nn.Module, numbers: list[torch.Tensor], length: int) -> torch.Tensor:
    names = (name for name, _ in chain(scheme.named_parameters(), scheme.named_buffers()))
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        given = ("distance_bias", torch.arange(length))
        return torch.func.functional_call(scheme, dict(zip(names, numbers, strict=True)), given).float()
