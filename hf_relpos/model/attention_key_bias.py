"""A bias that every key between the query and the key adds to: b[i, j] = Σ s_k, k = j+1..i, over the keys that i sees.

With c the running sum of s it is c_i − c_j, and c_i, the same for all keys of a query, leaves the softmax as it is. So
a kernel needs no bias at all: the keys carry −c_j in extra dimensions, which the queries meet with a constant.

Shape letters: B batch, H query heads, G key and value heads, N or Q, K tokens, D head size.
"""

import torch
import torch.nn.functional as F


NUM_TERMS = 3  # of 8 bits each: together the 24 of fp32, whatever the dtype of the keys
FACTOR = 64.0  # of the queries' constant: keeps the keys' extra dimensions within the range of fp16


def to_extra_dims(key_bias: torch.Tensor, num_groups: int, dtype: torch.dtype) -> torch.Tensor:
    """(B, H, N) fp32 → (B, G, N, NUM_TERMS · H / G) in `dtype`: the values of a key head's query heads, each as terms
    that bf16 holds exactly."""
    terms, rest = [], key_bias
    for _ in range(NUM_TERMS):
        terms.append(rest.to(torch.bfloat16).float())
        rest = rest - terms[-1]
    terms = torch.stack(terms, dim=-1).unflatten(1, (num_groups, -1))  # (B, G, H / G, N, NUM_TERMS)
    return terms.transpose(2, 3).flatten(3).to(dtype)


def add_key_bias(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, key_bias: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Puts the bias into extra dimensions, for any kernel of causal attention.

    Args:
        query: (B, H, Q, D).
        key, value: (B, G, K, D).
        key_bias: (B, H, K) fp32, s; 0 on padding.
        scaling: factor of the scores.

    Returns:
        query, key and value with as many channels each, a multiple of 8 as kernels want it; the first D channels of the
        attention's output are those of `value`.
    """
    device_type = query.device.type
    is_autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if is_autocast else query.dtype
    num_groups, head_dim = key.shape[1], key.shape[3]
    repeats = query.shape[1] // num_groups
    total = key_bias.cumsum(-1)
    # adds 0, and takes the mean out of its gradient, which is 0 but for rounding that the sum's gradient would pile up
    total = total - (total - total.detach()).mean(-1, keepdim=True)
    per_key = to_extra_dims(total / (-FACTOR * scaling), num_groups, dtype)
    # each query head meets the terms of its own values
    own = torch.eye(repeats, device=query.device, dtype=dtype).repeat_interleave(NUM_TERMS, dim=1) * FACTOR
    per_query = own.repeat(num_groups, 1)[None, :, None].expand(query.shape[0], -1, query.shape[2], -1)
    query = torch.cat((query.to(dtype), per_query), dim=-1)
    key = torch.cat((key.to(dtype), per_key), dim=-1)
    width = -(-query.shape[3] // 8) * 8
    query, key = (F.pad(x, (0, width - x.shape[3])) for x in (query, key))
    return query, key, F.pad(value.to(dtype), (0, width - head_dim))


def dense_key_bias(key_bias: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """(B, H, K) fp32 s, (B or 1, 1, Q, K) boolean → (B, H, Q, K) fp32 bias: the definition, for any mask."""
    seen = torch.where(visible, key_bias[:, :, None], 0.0)
    return seen.flip(-1).cumsum(-1).flip(-1) - seen
