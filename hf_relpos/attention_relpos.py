"""Attention over tensors: the eager reference, and the mask that carries a position bias into a kernel.

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
        if not config.needs_whole_rows:
            return
    if attn_implementation not in (None, *allowed):
        raise ValueError(
            f"`attn_implementation` must be one of {list(allowed)} for pos_embedding_type "
            f"{config.pos_embedding_type!r}, got {attn_implementation!r}: {reason}."
        )


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
    """The reference: scores, mask, softmax in fp32, weighted sum, one operation after the other.

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
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
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
    lowest = torch.finfo(query.dtype).min
    if attention_mask.dtype == torch.bool:
        mask = torch.where(attention_mask, position_bias, lowest)
    else:
        mask = position_bias + attention_mask
    # a large negative bias must not carry a masked score past the range of the query's dtype: -inf rows give NaN
    return mask.clamp(min=lowest).to(query.dtype if query.is_cuda else torch.promote_types(query.dtype, torch.float32))
