"""Which tensors a native library may be given."""

from functools import reduce
from operator import or_

import torch
from torch import nn

from .functional_transforms import is_traced, is_transformed


DTYPES = (torch.float32, torch.bfloat16)
# no subclass, no tensor of inference mode, none that stands for another or for what is computed later
PLAIN_TYPES, PLAIN_NAMES = (torch.Tensor, nn.Parameter), ("CPU", "ADInplaceOrView", "AutogradCPU", "AutocastCPU")
PLAIN_KEYS = reduce(
    or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr() for name in PLAIN_NAMES)
)
# modes that make a graph of what they see, or compute no numbers
GRAPH_MODES = tuple(torch._C._TorchDispatchModeKey.__members__.values())


def are_plain(*tensors: torch.Tensor) -> bool:
    """Whether a library may read them, and no graph, transform or mode looks on."""
    return are_plain_numbers(*tensors) and not torch._C._len_torch_dispatch_stack()


def are_plain_numbers(*tensors: torch.Tensor) -> bool:
    """Whether they have numbers on a CPU, and no graph or transform looks on; a mode may, if it makes no graph."""
    first = tensors[0]
    if type(first) not in PLAIN_TYPES or not first.is_cpu or is_traced(first) or is_transformed():
        return False
    return all(map(_has_its_numbers, tensors)) and not _makes_a_graph()


def _has_its_numbers(x: torch.Tensor) -> bool:
    """Whether they lie in memory as they are, one beside the other, and there are some."""
    if type(x) not in PLAIN_TYPES or x.dtype not in DTYPES or not x.is_contiguous() or x.numel() == 0:
        return False
    return torch._C._dispatch_keys(x).raw_repr() == PLAIN_KEYS


def _makes_a_graph() -> bool:
    """Whether a mode does."""
    if torch._ops._len_torch_dispatch_stack_pre_dispatch():
        return True
    get_mode = torch._C._get_dispatch_mode
    return torch._C._len_torch_dispatch_stack() > 0 and any(get_mode(key) is not None for key in GRAPH_MODES)
