"""What the hooks of a scheme must return: looked at where they are called, so that an error names the hook.

Shape letters: B batch, H heads, Q query length, K key length, C hidden size.
"""

from typing import Any

import torch

from .functional_transforms import is_traced


# hook that returns one tensor → what its dimensions are
DIMENSIONS = {
    "embed": "batch, queries, channels",
    "distance_bias": "heads, distances",
    "dense_bias": "batch or 1, heads, queries, keys",
    "key_bias": "batch, heads, queries",
    "score_bias": "batch or 1, heads, queries, keys",
}
# of these, what may return `None`
OPTIONAL = frozenset(("dense_bias", "key_bias", "score_bias"))


def wrong_result(hook: str, value: Any, args: tuple[Any, ...], num_heads: int) -> str | None:
    """→ what is wrong with the shape or the dtype of what a hook returned, or `None`.

    Args:
        hook: its name; of others than those of `DIMENSIONS` all is right.
        value: what it returned.
        args: what it was given.
        num_heads: H of the model.
    """
    if hook not in DIMENSIONS or (value is None and hook in OPTIONAL) or is_traced(value):
        return None
    wanted = _wanted_shape(hook, args, num_heads)
    shape = tuple(value.shape) if isinstance(value, torch.Tensor) else None
    if shape != wanted and not (shape and " or 1" in DIMENSIONS[hook] and shape == (1, *wanted[1:])):
        got = type(value).__name__ if shape is None else shape
        return f"`{hook}` must return ({DIMENSIONS[hook]}) = {wanted}, got {got}"
    if hook == "distance_bias" and value.dtype not in (torch.float32, torch.float64):
        return f"`{hook}` must return torch.float32, got {value.dtype}"
    if hook == "embed" and value.dtype != args[0].dtype and not torch.is_autocast_enabled(value.device.type):
        return f"`{hook}` must return {args[0].dtype} as it was given, got {value.dtype}"
    return None


def _wanted_shape(hook: str, args: tuple[Any, ...], num_heads: int) -> tuple[int, ...]:
    first = args[0]
    if hook == "distance_bias":
        return num_heads, *first.shape
    if hook == "key_bias":
        return first.shape[0], num_heads, first.shape[1]
    if hook == "dense_bias":
        parts = (first.query, first.key, first.distance, first.visible)
        return max(len(part) for part in parts), num_heads, first.query.shape[1], first.key.shape[1]
    return tuple(first.shape)
