"""Attention with a table of the distances in operations of torch alone: it can be transformed, and differentiated any
number of times, and takes a (Q, K) matrix for it.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, L length of a
table.
"""

import torch

from .attention_kernel import TableCall
from .functional_transforms import warn_of_memory


def dense_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
) -> torch.Tensor:
    """(B, H, Q, D), (B, G, K, D) twice, (H, L) → (B, H, Q, D) in the dtype of `query`; 0 for a query without keys."""
    warn_of_memory("Attention with a position bias", "a matrix of queries by keys")
    visible, distance = _visible_keys(query.shape[2], key.shape[2], query.device, call)
    repeats = query.shape[1] // key.shape[1]
    with torch.autocast(query.device.type, enabled=False):
        taken = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        q, k, v = (x.to(bias_table.dtype) for x in taken)
        scores = q @ k.transpose(2, 3) * call.scaling + bias_table[:, distance.clamp(max=bias_table.shape[1] - 1)]
        # the least number instead of −inf: a row without keys would be NaN in all derivatives
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(~visible, 0.0)
        return (weights @ v).to(query.dtype)


def _visible_keys(
    query_length: int, key_length: int, device: torch.device, call: TableCall
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (B or 1, 1, Q, K) boolean, the keys that each query sees, and (Q, K) distances of at least 0."""
    slots, keys = torch.arange(query_length, device=device) + call.offset, torch.arange(key_length, device=device)
    distance = slots[:, None] - keys
    visible = (distance >= 0 if call.is_causal else distance == distance)[None, None]
    if call.window is not None:
        visible = visible & (distance < call.window)
    if call.key_mask is not None:
        visible = visible & call.key_mask[:, None, None]
    if call.documents is not None:
        visible = visible & (call.documents[:, slots, None] == call.documents[:, None])[:, None]
    return visible, distance.clamp(min=0) if call.is_causal else distance.abs()
