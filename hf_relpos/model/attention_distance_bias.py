"""Attention with a bias that depends on the head and the distance alone: the operator, and FlexAttention with a table.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, L length of a
table.
"""

import zlib
from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers.integrations import flex_attention

from .attention_cpu import KeyBiasKernel  # noqa: F401  (importing a kernel registers it)
from .attention_dense import dense_attention
from .attention_kernel import TABLE_KERNELS, TableCall, select_kernel
from .attention_native import NativeKernel  # noqa: F401
from .attention_torch import BlockKernel  # noqa: F401
from .attention_triton import TritonKernel  # noqa: F401
from .functional_transforms import differentiable_gradients, is_tracing, is_transformed


class NotFiniteError(ValueError):
    """A table with NaN or infinity, which is said only where a look at it does not wait for a device."""


def distance_bias_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    *,
    scaling: float | None = None,
    is_causal: bool = True,
    offset: int | None = None,
    key_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Exact softmax attention with a bias that depends on the head and the distance alone.

    out[i] = Σ_j softmax_j(scaling · q_i · k_j + bias_table[h, d(i, j)]) v_j over the keys j that query i sees, where
    d(i, j) = offset + i − j, without its sign if the attention is not causal. Memory is linear in the lengths, forward
    and backward; sums are taken in fp32 and in an order that the shapes and the number of threads fix. Differentiable
    in query, key, value and `bias_table`; derivatives of derivatives, forward mode and the transforms of `torch.func`
    take a (Q, K) matrix.

    Args:
        query: (B, H, Q, D), fp32, bf16, fp16 or fp64.
        key, value: (B, G, K, D) in the dtype of `query`; H is a multiple of G.
        bias_table: (H, L) fp32 (fp64 with fp64), finite; the bias at the distances 0..L−1, as many as are seen.
        scaling: factor of q · k, D^(−1/2) by default.
        is_causal: whether keys after the query are hidden.
        offset: key slot of the first query, K − Q by default; the keys of a preallocated cache may continue after
            the last query.
        key_mask: (B, K) boolean, False on padding.
        documents: (B or 1, K) integers: a query sees the keys of its own document only.
        window: a query sees the keys at distances below it only (sliding window); causal attention only.

    Returns:
        (B, H, Q, D) in the dtype of `query`; 0 for a query that sees no key.

    Raises:
        ValueError: for shapes or dtypes that do not fit, a table that is too short or not finite.
    """
    if torch.is_autocast_enabled(query.device.type) and query.dtype != torch.float64:  # as for the kernels of torch
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    offset = key.shape[2] - query.shape[2] if offset is None else offset
    scaling = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    call = TableCall(scaling, is_causal, offset, key_mask, documents, window)
    _check_arguments(query, key, value, bias_table, call)
    if window is not None and window >= offset + query.shape[2]:
        call = replace(call, window=None)
    if is_transformed():
        return dense_attention(query, key, value, bias_table, call)
    kernel = select_kernel(query, key, bias_table, call)
    if not kernel.is_operator:
        return kernel.attend(query, key, value, bias_table, call)
    return _attend(query, key, value, bias_table, kernel.name, *_flat(call))[0]


def _flat(call: TableCall) -> tuple:
    """As the operators take it: a schema of torch knows no dataclass."""
    return tuple(getattr(call, item.name) for item in fields(call))


def _check_arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    call: TableCall,
) -> None:
    is_causal, offset, key_mask = call.is_causal, call.offset, call.key_mask
    documents, window = call.documents, call.window

    def refuse(what: str) -> None:
        tensors = {"query": query, "key": key, "value": value, "bias_table": bias_table}
        shapes = ", ".join(f"{name} {tuple(x.shape)} {x.dtype}" for name, x in tensors.items())
        raise ValueError(f"{what}; got {shapes}, offset {offset}.")

    if any(x.ndim != 4 for x in (query, key, value)) or bias_table.ndim != 2:
        refuse("`query`, `key` and `value` must have 4 dimensions and `bias_table` 2")
    if query.dtype != key.dtype or query.dtype != value.dtype or not query.is_floating_point():
        refuse("`query`, `key` and `value` must have one floating point dtype")
    if bias_table.dtype != torch.promote_types(query.dtype, torch.float32):
        refuse("`bias_table` must be in float32, in float64 beside float64")
    (batch_size, num_heads, query_length, _), num_keys = query.shape, key.shape[2]
    if key.shape != value.shape or batch_size != key.shape[0] or query.shape[3] != key.shape[3]:
        refuse("`key` and `value` must have one shape, with the batch and head size of `query`")
    if num_heads % key.shape[1] or bias_table.shape[0] != num_heads:
        refuse("the heads of `query` must be those of `bias_table` and a multiple of those of `key`")
    if min(query_length, num_keys) < 1 or offset < 0 or (is_causal and num_keys < offset + query_length):
        refuse("`key` must hold the slots of all queries, from `offset` on")
    if window is not None and (window < 1 or not is_causal):
        refuse(f"`window` must be at least 1, and `is_causal` be true beside it, got {window}, {is_causal}")
    longest = offset + query_length if is_causal else max(offset + query_length, num_keys - offset)
    longest = longest if window is None else min(longest, window)
    if bias_table.shape[1] < longest:
        refuse(f"`bias_table` must hold the distances 0..{longest - 1}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch_size, num_keys)):
        refuse(f"`key_mask` must be ({batch_size}, {num_keys}) torch.bool, not {(*key_mask.shape,)} {key_mask.dtype}")
    if documents is not None and (
        documents.ndim != 2 or documents.shape not in ((batch_size, num_keys), (1, num_keys))
    ):
        refuse(f"`documents` must be ({batch_size}, {num_keys}), not {(*documents.shape,)}")
    if is_tracing(bias_table) or is_transformed():
        return
    if bias_table.is_cuda:
        torch._assert_async(bias_table.isfinite().all(), "`bias_table` must be finite")  # without a wait for the device
    elif not bool(bias_table.isfinite().all()):
        raise NotFiniteError("`bias_table` must be finite.")


# The same code may be loaded from several saved folders beside the package: each copy has operators of its own
_NAMESPACE = f"relpos_{zlib.crc32(__name__.encode()):08x}"


@torch.library.custom_op(f"{_NAMESPACE}::distance_bias_attention", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    kernel: str,
    scaling: float,
    is_causal: bool,
    offset: int,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    call = TableCall(scaling, is_causal, offset, key_mask, documents, window)
    out, lse = TABLE_KERNELS[kernel].forward(query, key, value, bias_table, call)
    return _as_layers(out), lse


@_attend.register_fake
def _(query, key, value, bias_table, *call):
    return _like_layers(query), query.new_empty(query.shape[:3], dtype=bias_table.dtype)


@torch.library.custom_op(f"{_NAMESPACE}::distance_bias_attention_backward", mutates_args=())
def _attend_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias_table: torch.Tensor,
    kernel: str,
    scaling: float,
    is_causal: bool,
    offset: int,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    window: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    call = TableCall(scaling, is_causal, offset, key_mask, documents, window)
    *gradients, grad_table = TABLE_KERNELS[kernel].backward(grad_out, query, key, value, out, lse, bias_table, call)
    return *map(_as_layers, gradients), grad_table


@_attend_backward.register_fake
def _(grad_out, query, key, value, out, lse, bias_table, *call):
    return *(_like_layers(x) for x in (query, key, value)), bias_table.new_empty(bias_table.shape)


def _like_layers(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) laid out as the layers do, the heads of a token beside each other."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def _as_layers(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D) in the memory layout that a traced graph expects; a copy only for a kernel with another one."""
    return x if x.transpose(1, 2).is_contiguous() else _like_layers(x).copy_(x)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.kernel, ctx.scaling, ctx.is_causal, ctx.offset, key_mask, documents, ctx.window = inputs
    ctx.save_for_backward(*tensors, key_mask, documents, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: torch.Tensor, _: Any) -> tuple:
    query, key, value, bias_table, key_mask, documents, out, lse = ctx.saved_tensors
    call = (ctx.scaling, ctx.is_causal, ctx.offset, key_mask, documents, ctx.window)
    if torch.is_grad_enabled():  # `create_graph=True`
        function = partial(dense_attention, call=TableCall(*call))
        gradients = differentiable_gradients(function, (query, key, value, bias_table), grad_out)
    else:
        gradients = _attend_backward(grad_out, query, key, value, out, lse, bias_table, ctx.kernel, *call)
    return *gradients, None, *(None for _ in call)


_attend.register_autograd(_backward, setup_context=_save_for_backward)


def flex_distance_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    attention_mask: Any,
    offset: int,
    scaling: float,
) -> torch.Tensor:
    """As `distance_bias_attention`, by FlexAttention, which reads the table for each score.

    Args:
        attention_mask: the `BlockMask` of transformers, which hides the future, padding, other documents and what lies
            outside of a window.

    Returns:
        (B, H, Q, D).
    """
    last = bias_table.shape[1] - 1

    def add_bias(score, batch, head, query_index, key_index):
        return score + bias_table[head, (query_index + offset - key_index).clamp(0, last)]

    return flex_attention.compile_friendly_flex_attention(
        query,
        key,
        value,
        score_mod=add_bias,
        block_mask=attention_mask,
        enable_gqa=module.num_key_value_groups > 1,
        scale=scaling,
        training=module.training,
    )
