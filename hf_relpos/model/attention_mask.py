"""Attention with a mask: the eager reference, masks that carry a position bias into the kernels of others, and which
implementations of transformers take them.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig


# the implementations that take a position bias; all others would drop it
BIAS_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


def check_implementation(config: PreTrainedConfig, attn_implementation: str | None) -> None:
    """Raises `ValueError` for an attention implementation that would serve the scheme wrongly."""
    allowed, reason = BIAS_IMPLEMENTATIONS, "it would drop the position bias"
    if not config.has_position_bias:
        allowed += ("flash_attention_2", "flash_attention_3", "flash_attention_4")
        reason = "its rows hold several sequences, and the angles of the rope_type follow the length of the row"
        if not config.requires_unpacked:
            return
    if attn_implementation not in (None, *allowed):
        raise ValueError(
            f"`attn_implementation` must be one of {list(allowed)} for pos_embedding_type "
            f"{config.pos_embedding_type!r}, got {attn_implementation!r}: {reason}."
        )


def check_continuous_batching(config: PreTrainedConfig) -> None:
    """Raises `ValueError` for a scheme that continuous batching of transformers would compute wrongly."""
    scheme, reason = f"pos_embedding_type {config.pos_embedding_type!r}", None
    if config.has_position_bias:
        reason = f"has no place for the position bias of {scheme}"
    elif config.requires_unpacked:
        reason = f"puts several sequences into one row, and the angles of {scheme} follow the length of the row"
    if reason:
        raise ValueError(f"continuous batching {reason}: use `generate`, with prompts padded on the left.")


def row_mask(bias: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """The additive mask of one query that sees all keys: (H, K) fp32 bias → (1, H, 1, K)."""
    return _fit(bias[None, :, None], query)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference: scores, mask, softmax in fp32 (fp64 beside fp64), weighted sum, one operation after the other.

    Args:
        query: (B, H, Q, D).
        key, value: (B, G, K, D).
        attention_mask: (B or 1, H or 1, Q, K), boolean (True attends) or additive; `None` for no mask.
        scaling: factor of the scores.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, Q, H, D) output and (B, H, Q, K) attention weights.
    """
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling  # (B, H, Q, K)
    lowest = torch.finfo(scores.dtype).min
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, lowest)
        else:  # rows of -inf give NaN, which spreads from padding to all tokens
            scores = (scores + attention_mask).clamp(min=lowest)
    weights = F.softmax(scores, dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def merge_position_bias(position_bias: torch.Tensor, attention_mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Makes one additive mask of a position bias and a mask that hides the future, for any kernel that takes a mask.

    Args:
        position_bias: (B or 1, H, Q, K) fp32.
        attention_mask: (B or 1, 1 or H, Q, K), boolean (True attends) or additive.
        query: (B, H, Q, D); gives the dtype: CUDA kernels want the mask in that of the query, the CPU takes fp32.

    Returns:
        (B or 1, H, Q, K).
    """
    if attention_mask.dtype == torch.bool:
        return _fit(hide(position_bias, attention_mask, query), query)
    return _fit(position_bias + attention_mask, query)


def hide(bias: torch.Tensor, visible: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`bias` where `visible`, elsewhere the least number of the dtype of `query`, which fp32 does not hold for fp64."""
    return torch.where(visible, bias.to(torch.promote_types(bias.dtype, query.dtype)), torch.finfo(query.dtype).min)


def _fit(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """An additive mask in the dtype and the range that the kernels want beside `query`."""
    # a large negative bias must not carry a masked score past the range of the query's dtype: -inf rows give NaN
    mask = mask.clamp(min=torch.finfo(query.dtype).min)
    return mask.to(query.dtype if query.is_cuda else torch.promote_types(query.dtype, torch.float32))
