"""What the transforms of `torch.func`, forward-mode differentiation and derivatives of derivatives ask of a forward:
they know the operations of torch, and no operator that has a kernel of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from transformers.utils import import_utils, logging


logger = logging.get_logger(__name__)


def is_tracing(tensor: torch.Tensor) -> bool:
    """Whether Python cannot look at the values: a graph is traced, or `torch.func.vmap` has many tensors in one."""
    return is_traced(tensor) or is_batched(tensor)


def is_traced(tensor: torch.Tensor) -> bool:
    """Whether a graph is traced. transformers knows all ways of it, and takes as long as several operations: a plain
    tensor on a CPU can only be in the two that have no tensors of their own."""
    if type(tensor) is torch.Tensor and tensor.is_cpu:
        return torch.compiler.is_compiling() or torch.jit.is_tracing()
    return import_utils.is_tracing(tensor)


def is_batched(tensor: Any) -> bool:
    """Whether `torch.func.vmap` has many tensors in this one."""
    functorch = torch._C._functorch
    if torch.compiler.is_compiling():
        return False
    while isinstance(tensor, torch.Tensor) and functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def assert_async(condition: torch.Tensor, message: str) -> None:
    """Refuses values that Python cannot look at, where the graph runs; `torch.func.vmap` knows no such check."""
    if not is_batched(condition):
        torch._assert_async(condition, message)


def is_transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is under way."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_differentiated_again() -> bool:
    """Whether one of these needs more than a first gradient, which is all that torch's fused attention has."""
    if not is_transformed():
        return False
    kinds = [level.key().name for level in torch._C._functorch.get_interpreter_stack() or ()]
    return forward_ad._current_level >= 0 or "Jvp" in kinds or kinds.count("Grad") > 1


def differentiable_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad_output: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    """→ the gradients of `function(*inputs)`, `None` for inputs that need none, as a graph that can be differentiated.

    Args:
        function: in operations of torch.
        inputs: floating point tensors.
        grad_output: in the shape of what `function` returns.
    """
    with torch.enable_grad():
        views = [x.view_as(x) for x in inputs]  # one tensor may be several inputs
        wanted = [view for view, x in zip(views, inputs) if x.requires_grad]
        found = iter(torch.autograd.grad(function(*views), wanted, grad_output, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def warn_of_memory(what: str, takes: str) -> None:
    """Says once that derivatives of this kind take another path."""
    logger.warning_once(
        f"{what} takes {takes} under transforms of `torch.func`, in forward mode and for derivatives of derivatives."
    )


class _Clamp(torch.autograd.Function):
    """`clamp` whose gradient passes for values outside of the range too, unless a step along it would lead further out:
    what a step of the optimiser carried outside can come back, which it never does after `torch.clamp`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        x, *ctx.bounds = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        outward = ((x < low) & (gradient > 0)) | ((x > high) & (gradient < 0))
        return gradient.masked_fill(outward, 0.0), None, None


class _ForwardClamp(_Clamp):
    """The same with a derivative in forward mode, which a compiled graph may not have."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
        _Clamp.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor, *_: Any) -> torch.Tensor:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        return tangent.masked_fill((x < low) | (x > high), 0.0)


def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    """→ `x`, with `low` and `high` for what is less or more: see `_Clamp` for its gradient."""
    return (_ForwardClamp if is_transformed() else _Clamp).apply(x, low, high)
