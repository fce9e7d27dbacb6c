"""Where the keys stand that a forward sees, those among them that a cache holds from earlier tokens.

Shape letters: B batch, H query heads, Q query length, K key length.
"""

from dataclasses import dataclass

import torch
from transformers import Cache

from .functional_transforms import assert_async, is_tracing
from .token_positions import TokenPositions, varying


@dataclass(frozen=True)
class KeyPositions:
    """Where the keys of some layers stand: those with a window may have dropped the first ones.

    Attributes:
        length: number K of key slots.
        num_dropped: number of keys that the layers have dropped.
        mask: (B, K) boolean, False on padding, or `None`.
        offset: slot of the first query among the keys that are left.
    """

    length: int
    num_dropped: int
    mask: torch.Tensor | None
    offset: int | torch.Tensor

    def positions(self, tokens: TokenPositions) -> torch.Tensor:
        """→ (B or 1, K) positions of the keys."""
        slots = torch.arange(self.length, device=tokens.position_ids.device) + self.num_dropped
        return _key_positions(tokens.position_ids, tokens.padding, tokens.past_length, slots, self.num_dropped)


def locate_keys(tokens: TokenPositions, layer_idx: int) -> KeyPositions:
    """The keys that a layer sees in a forward, those of this forward among them."""
    query_length = tokens.position_ids.shape[1]
    length, num_dropped, mask = query_length, 0, None
    if tokens.cache is not None:
        length, num_dropped = tokens.cache.get_mask_sizes(query_length, layer_idx)
    if tokens.padding is not None:
        mask = pad_mask(tokens.padding[:, num_dropped : num_dropped + length].bool(), length)
    return KeyPositions(length, num_dropped, mask, tokens.past_length - num_dropped)


def pad_mask(key_mask: torch.Tensor | None, key_length: int) -> torch.Tensor | None:
    """(B, k) → (B, K): the slots after the last query are still empty."""
    if key_mask is None or key_mask.shape[1] == key_length:
        return key_mask
    return torch.nn.functional.pad(key_mask, (0, key_length - key_mask.shape[1]))


def visible_keys(
    query_slots: torch.Tensor,
    keys: KeyPositions,
    documents: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    window: int | None,
) -> torch.Tensor:
    """→ (B or 1, 1, Q, K) boolean: the keys that each query sees, by a ready mask, or by slots, padding, documents."""
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        visible = attention_mask.any(1, keepdim=True)
    else:
        key_slots = torch.arange(keys.length, device=query_slots.device)
        visible = (key_slots <= query_slots[:, None])[None, None]
        if keys.mask is not None:
            visible = visible & keys.mask[:, None, None]
        if documents is not None:
            visible = visible & (documents[:, None, query_slots, None] == documents[:, None, None])
    if window is not None:
        visible = visible & (torch.arange(keys.length, device=query_slots.device) > query_slots[:, None] - window)
    return visible


def check_ready_mask(visible: torch.Tensor, key_positions: torch.Tensor, position_ids: torch.Tensor) -> None:
    """Refuses a ready mask beside a cache where it does not say which positions the cached keys have: they are counted
    back from the last query, as if every key that the mask hides between others held a token, or none did.

    Args:
        visible: (B or 1, 1, Q, K), from `visible_keys`.
        key_positions: (B or 1, K).
        position_ids: (B or 1, Q).

    Raises:
        ValueError: if hidden keys stand between seen ones, or positions of the queries skip numbers.
    """
    seen, slots = visible.any(2)[:, 0], torch.arange(visible.shape[3], device=visible.device)
    differs = varying(slots - seen.long().cumsum(-1), seen).any() | (position_ids.diff(dim=-1) != 1).any()
    message = (
        "`attention_mask` of 4 dimensions beside a cache must hide no key between others, and `position_ids` must "
        "increase by one, with a position bias: give the (batch size, number of tokens) mask that it was made of."
    )
    if is_tracing(differs):
        assert_async(~differs, message)
    elif differs:
        raise ValueError(message)


def pad_to_cache(attention_mask: torch.Tensor, cache: Cache) -> torch.Tensor:
    """(B, k) → (B, K): as wide as the cache, so that the steps of a compiled graph have masks of one shape; behind the
    layers that a window keeps short, as wide as the next power of two."""
    width, length = attention_mask.shape[1], cache.get_max_length()
    return pad_mask(attention_mask, length if length >= width else 2 ** (width - 1).bit_length())


def _key_positions(
    position_ids: torch.Tensor,
    padding: torch.Tensor | None,
    past_length: int | torch.Tensor,
    key_slots: torch.Tensor,
    num_dropped: int,
) -> torch.Tensor:
    """→ (B or 1, K) positions of all keys. Slots that no query may see yet get arbitrary values."""
    query_length = position_ids.shape[1]
    if isinstance(past_length, int) and past_length == 0:
        ahead = key_slots[query_length:] - (query_length - 1)
        return torch.cat((position_ids, position_ids[:, -1:] + ahead), dim=-1)
    start = _count_back(position_ids, padding, past_length)
    if padding is None:
        return key_slots + start
    counted = padding.long().cumsum(-1) - 1
    end = num_dropped + key_slots.shape[0]
    counted = torch.cat((counted, counted[:, -1:].expand(-1, max(end - counted.shape[1], 0))), dim=-1)
    return counted[:, num_dropped:end] + start


def _count_back(
    position_ids: torch.Tensor, padding: torch.Tensor | None, past_length: int | torch.Tensor
) -> torch.Tensor:
    """→ (B or 1, 1): the position of the first real token, where some are cached and only the queries' are known."""
    last = past_length + position_ids.shape[1] - 1  # a real token
    if padding is None:
        return position_ids[:, -1:] - last
    # not `as_tensor`, which makes a constant of a length that is traced
    last_slot = last + torch.zeros(1, dtype=torch.long, device=position_ids.device)
    return position_ids[:, -1:] - (padding.long().cumsum(-1) - 1).index_select(1, last_slot)


def document_starts(tokens: TokenPositions) -> torch.Tensor:
    """→ (B or 1, Q or 1): the position of the first token of each query's document, which a window may hide. A ready
    mask says nothing about it: then positions count from the first token."""
    position_ids, padding = tokens.position_ids, tokens.padding
    if padding is None and tokens.attention_mask is not None:
        return torch.zeros_like(position_ids[:, :1])
    if not (isinstance(tokens.past_length, int) and tokens.past_length == 0):
        return _count_back(position_ids, padding, tokens.past_length)
    documents = torch.zeros_like(position_ids) if tokens.documents is None else tokens.documents
    if padding is not None:
        position_ids = position_ids.masked_fill(~padding.bool(), torch.iinfo(position_ids.dtype).max)
    documents = documents.expand(position_ids.shape[0], -1)
    lowest = torch.full_like(position_ids, torch.iinfo(position_ids.dtype).max)
    return lowest.scatter_reduce(1, documents, position_ids, "amin").gather(1, documents)


def is_contiguous(key: torch.Tensor, key_mask: torch.Tensor | None, documents: torch.Tensor | None) -> bool:
    """Whether distances between positions are distances between slots, wherever a query may see a key.

    Args:
        key: (B or 1, K) positions of the keys.
        key_mask: (B, K) boolean, False on padding, or `None`.
        documents: (B or 1, K) or `None`.
    """
    if documents is not None:
        if key_mask is not None:
            return False
        return bool(((key.diff(dim=-1) == 1) | (documents.diff(dim=-1) != 0)).all())
    offset = key - torch.arange(key.shape[1], device=key.device)
    return not bool(varying(offset, torch.ones_like(key, dtype=torch.bool) if key_mask is None else key_mask).any())
