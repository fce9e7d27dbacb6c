"""RMSNorm in operations of torch, and for training on CPUs one by `hf_relpos.native`: the same bits forward, and one
pass backward.

Shape letters: N leading dimensions, C width.
"""

import itertools
from functools import partial
from typing import Any

import torch

from .functional_transforms import differentiable_gradients
from .plain_tensors import DTYPES, are_plain


INTERFACE = 1  # of the norm in `hf_relpos.native`, whose version may be another than that of this file


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """(N, C), (C,) → weight · (hidden_states / sqrt(mean(hidden_states²) + eps), in their dtype), fp32 before that."""
    normed = hidden_states.float()
    # a product with itself: the gradient of `pow` takes twice as long on CPUs
    normed = normed * torch.rsqrt((normed * normed).mean(-1, keepdim=True) + eps)
    return weight * normed.to(hidden_states.dtype)


def has_norm(library: Any | None) -> bool:
    """Whether there is a `hf_relpos.native.Library`, and it has the norm as it is called here."""
    return getattr(library, "norm_interface", None) == INTERFACE


def is_plain_training(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether a gradient is taken on a CPU, and nothing but autograd asks which operations there are."""
    if not torch.is_grad_enabled() or not are_plain(hidden_states, weight):
        return False
    needs_gradient = hidden_states.requires_grad or weight.requires_grad
    return needs_gradient and hidden_states.shape[-1:] == weight.shape


class FusedNorm(torch.autograd.Function):
    """`rms_norm` by a library that `has_norm`, of what `is_plain_training` allows. Transforms of `torch.func` never
    come here: without `setup_context`, which is for them, a call takes half the time."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, library: Any) -> torch.Tensor:
        out, rstd = library.norm_forward(hidden_states, weight, eps)
        ctx.save_for_backward(hidden_states, weight, rstd)
        ctx.eps, ctx.library = eps, library
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple:
        hidden_states, weight, rstd = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        # for derivatives of derivatives, or many at once
        if torch.is_grad_enabled() or not are_plain(hidden_states, weight, rstd, grad_out):
            function = partial(rms_norm, eps=ctx.eps)
            gradients = differentiable_gradients(function, (hidden_states, weight), grad_out)
        else:
            needed = ctx.needs_input_grad[:2]
            gradients = ctx.library.norm_backward(grad_out, hidden_states, weight, rstd, *needed)
        return *gradients, None, None


def check_norm(library: Any) -> None:
    """Compares the norm of a library with operations of torch.

    Raises:
        RuntimeError: if a bit of the output differs, or a gradient by more than rounding.
    """
    generator = torch.Generator().manual_seed(0)
    x, grad_out = torch.randn(2, 3, 23, 45, generator=generator)
    weight, eps = torch.randn(45, generator=generator), 1e-3
    for dtype, weight_dtype in itertools.product(DTYPES, repeat=2):
        inputs = x.to(dtype), weight.to(weight_dtype)
        expected = rms_norm(*inputs, eps)
        out, rstd = library.norm_forward(*inputs, eps)
        gradients = library.norm_backward(grad_out.to(out.dtype), *inputs, rstd)
        pairs = zip((out.float(), *gradients), (expected.float(), *_gradients(grad_out, x, weight, eps)))
        off = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
        if not (off[0] == 0 and max(off) < (1e-4 if dtype == weight_dtype == torch.float32 else 3e-2)):
            raise RuntimeError(f"it is off by {max(off):.1e} in the norm of {dtype} with a weight in {weight_dtype}")


def _gradients(
    grad_out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ those of `rms_norm`, written out."""
    rstd = torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    normed, grad_normed = x * rstd, grad_out * weight
    grad_x = (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True)) * rstd
    return grad_x, (grad_out * normed).flatten(0, -2).sum(0)
