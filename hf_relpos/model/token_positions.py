"""Which position each token has: padding, caching, packing and position-start augmentation are decided here.

Shape letters: B batch, Q query length, K key length.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from transformers import Cache
from transformers.utils.import_utils import is_tracing

from .scheme_base import Positions


# cache of keys → what the tables were computed from, and `Positions.reversed_tables`; not an attribute of the cache,
# which others copy and flatten
_REVERSED_TABLES: WeakKeyDictionary[Cache, tuple[list, dict[int, torch.Tensor]]] = WeakKeyDictionary()


def is_exported(tensor: torch.Tensor) -> bool:
    """Whether a graph is made for others to run, who know the operators of torch alone."""
    return is_tracing(tensor) and (torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling())


def cached_length(cache: Cache | None) -> int | torch.Tensor:
    """The number of tokens in a cache."""
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, torch.Tensor):  # a static cache counts in place
        length = length.clone() if is_tracing(length) else int(length)
    return length


def check_mask(
    attention_mask: torch.Tensor | None, batch_size: int, query_length: int, past_length: int | torch.Tensor
) -> None:
    """Raises `ValueError` for a mask that does not fit: attention would be computed, over other keys than meant."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 4:
        return  # a ready mask, which meets the scores as it is
    fits = attention_mask.ndim == 2 and attention_mask.shape[0] == batch_size
    if fits and isinstance(past_length, int):
        width = attention_mask.shape[1]
        fits = width == query_length if past_length == 0 else width >= past_length + query_length
    if not fits:
        raise ValueError(
            f"`attention_mask` must be of shape ({batch_size}, number of cached tokens + {query_length}), got "
            f"{tuple(attention_mask.shape)} with {past_length} cached tokens."
        )


def simplify_mask(attention_mask: Any) -> Any:
    """A (B, K) mask that hides nothing becomes `None`, so that all rows may share their positions."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2 or is_tracing(attention_mask):
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


def count_positions(
    attention_mask: torch.Tensor | None, past_length: int | torch.Tensor, query_length: int, device: torch.device
) -> torch.Tensor:
    """→ (B or 1, Q): the index of each query among the real tokens of its row; 0 on padding before the first one."""
    slots = past_length + torch.arange(query_length, device=device)
    if attention_mask is None or attention_mask.ndim != 2:
        return slots[None]
    counted = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return counted.index_select(1, slots)


def find_documents(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """The document of each token of a packed row: a new one starts where a position does not exceed the one before.

    Args:
        position_ids: (B or 1, Q).
        attention_mask: (B, Q), 0 on padding, or `None`.

    Returns:
        (B or 1, Q) document indices, or `None` if no row holds more than one.
    """
    if attention_mask is None:
        starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1] - 1) <= 0
    else:
        real = attention_mask.bool()
        position_ids = position_ids.expand(real.shape[0], -1)
        slots = torch.arange(real.shape[1], device=real.device)
        last_real = torch.where(real, slots, -1).cummax(dim=-1).values
        before = torch.cat((torch.full_like(last_real[:, :1], -1), last_real[:, :-1]), dim=-1)
        starts = real & (before >= 0) & (position_ids <= position_ids.gather(1, before.clamp(min=0)))
    documents = starts.cumsum(-1)
    if not is_tracing(documents) and not bool(starts.any()):
        return None
    return documents


def inspect_positions(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    past_length: int | torch.Tensor,
    has_cache: bool,
    needs_distance: bool,
) -> tuple[torch.Tensor | None, bool]:
    """What given positions mean: the documents of a packed row, and whether later tokens can be cached after them.

    Args:
        position_ids: (B or 1, Q).
        attention_mask: (B, K), 0 on padding, or `None`.
        past_length: number of tokens in the cache.
        has_cache: whether there is one.
        needs_distance: whether any scheme needs the positions of cached keys, which are found again by counting.

    Returns:
        (B or 1, Q) document indices or `None`, see `find_documents`, and whether a cache may hold these tokens.

    Raises:
        ValueError: if there is a cache that may not.
    """
    if position_ids.shape[1] == 1 or (has_cache and is_tracing(position_ids)):
        return None, True
    recent = attention_mask
    if attention_mask is not None and has_cache:
        slots = past_length + torch.arange(position_ids.shape[1], device=attention_mask.device)
        recent = attention_mask.index_select(1, slots)
    documents = find_documents(position_ids, recent)
    if is_tracing(position_ids):
        return documents, True
    cacheable = documents is None and not (needs_distance and _has_gaps(position_ids, recent))
    if has_cache and not cacheable:
        raise ValueError(
            "`cache` must be None for packed sequences (`position_ids` that restart) and, with a "
            "position bias, for positions that leave numbers out."
        )
    return documents, cacheable


def _has_gaps(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether positions leave numbers out between the real tokens of a row."""
    if attention_mask is None:
        return bool((position_ids.diff(dim=-1) != 1).any())
    real = attention_mask.bool()
    return _varies(position_ids - real.long().cumsum(-1), real)


def _varies(offset: torch.Tensor, real: torch.Tensor) -> bool:
    """Whether (B or 1, N) numbers differ between the real tokens of a row."""
    lowest = torch.where(real, offset, offset.max()).amin(-1)
    highest = torch.where(real, offset, offset.min()).amax(-1)
    return bool((lowest < highest).any())


def same_document(documents: torch.Tensor) -> Callable:
    """(B or 1, Q) document indices → a mask function of transformers: a query sees keys of its own document only."""
    rows = documents.shape[0]

    def mask(batch_idx, head_idx, q_idx, kv_idx):
        row = batch_idx if rows > 1 else 0 * batch_idx
        return documents[row, q_idx] == documents[row, kv_idx]

    return mask


def flash_lengths(
    documents: torch.Tensor, attention_mask: torch.Tensor | None, batch_size: int
) -> dict[str, torch.Tensor | int]:
    """Where documents begin and end in the rows laid end to end, as flash attention takes it.

    Args:
        documents: (B or 1, Q), from `find_documents`.
        attention_mask: must be `None`.
        batch_size: B.

    Returns:
        the `FlashAttentionKwargs` of transformers.

    Raises:
        ValueError: if there is a mask, which flash attention would take in place of the documents.
    """
    if attention_mask is not None:
        raise ValueError("`attention_mask` must be None for packed sequences with flash attention.")
    documents = documents.expand(batch_size, -1)
    starts = torch.cat((torch.ones_like(documents[:, :1]), documents.diff(dim=-1)), dim=-1).flatten().nonzero()[:, 0]
    bounds = torch.cat((starts, starts.new_tensor([documents.numel()]))).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}


def augment_starts(
    position_ids: torch.Tensor, documents: torch.Tensor | None, batch_size: int, max_positions: int
) -> torch.Tensor:
    """Position-start augmentation: each document of each row starts at k ~ U{0 .. max_positions − length}.

    Args:
        position_ids: (B or 1, Q).
        documents: (B or 1, Q) or `None`, from `find_documents`.
        batch_size: B.
        max_positions: exclusive upper bound of the positions given out; length is Q, whatever the documents' lengths.

    Returns:
        (B, Q).

    Raises:
        ValueError: if the sequence is longer than `max_positions`.
    """
    length = position_ids.shape[1]
    if length > max_positions:
        raise ValueError(
            f"`position_start_augmentation` needs sequences of at most `max_position_embeddings`={max_positions} "
            f"tokens, got {length}."
        )
    starts = torch.randint(max_positions - length + 1, (batch_size, length), device=position_ids.device)
    if documents is None:
        starts = starts[:, :1]
    else:
        starts = starts.gather(1, documents.expand(batch_size, -1))
    return position_ids + starts


def build_positions(
    position_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    cache: Cache | None,
    past_length: int | torch.Tensor,
    needs_pairs: bool,
    table_limit: float,
    is_counted: bool,
    span: int | None = None,
    layer_idx: int = 0,
    window: int | None = None,
) -> Positions:
    """Positions of the queries, of all keys in the cache, and what lies between them.

    Args:
        position_ids: (B or 1, Q) positions of the queries.
        attention_mask: (B, K), 0 on padding; anything else says nothing about positions, but what is visible.
        documents: (B or 1, Q) or `None`, from `find_documents`.
        cache: the cache before this forward's update, or `None`.
        past_length: number of tokens in it; taken before the update, which changes a static cache's counter in place.
        needs_pairs: whether any scheme looks at pairs of a query and a key.
        table_limit: the largest position, from the first token on, of a query that a table of the distances serves,
            where they follow the slots; below 0 if there is no table.
        is_counted: whether `position_ids` are from `count_positions`.
        span: a bound of the positions where they are known to leave numbers out.
        layer_idx: a layer whose keys are meant: layers with a window may have dropped the first ones.
        window: how many keys a query sees at most, its own among them; `None` for all.
    """
    query_length = position_ids.shape[1]
    key_length, num_dropped = query_length, 0
    if cache is not None:
        key_length, num_dropped = cache.get_mask_sizes(query_length, layer_idx)
    padding = attention_mask if attention_mask is not None and attention_mask.ndim == 2 else None
    key_mask = padding
    if padding is not None:
        key_mask = _pad(padding[:, num_dropped : num_dropped + key_length].bool(), key_length)
    if not needs_pairs and table_limit < 0:
        return Positions(
            position_ids, position_ids, None, key_length, key_mask=key_mask, documents=documents, window=window
        )

    key_slots = torch.arange(key_length, device=position_ids.device) + num_dropped
    key = _key_positions(position_ids, padding, past_length, key_slots, num_dropped)
    past_length = past_length - num_dropped  # from here on slots are those of the keys that are left
    traced = is_tracing(key)
    if table_limit >= 0 and isinstance(past_length, int) and padding is attention_mask:
        slots = past_length + query_length
        # a graph's shapes cannot follow the data: there is no looking at them
        by_construction = (is_counted or query_length == 1) and padding is None and documents is None
        seen_mask = None if key_mask is None else key_mask[:, :slots]
        if by_construction or (not traced and _is_contiguous(key[:, :slots], seen_mask, documents)):
            positions = Positions(
                position_ids,
                key,
                None,
                min(slots, window or slots),
                past_length,
                _pad(seen_mask, key_length),
                documents,
                window=window,
            )
            if table_limit == math.inf or slots <= table_limit + 1:
                return positions
            num_served = math.floor(table_limit) + 1 - past_length  # of the queries
            positions.tail = _pairs(positions, past_length, attention_mask, max(num_served, 0))
            return positions if num_served > 0 else positions.tail
    span = max(key_length + num_dropped, span or 0)
    positions = Positions(position_ids, key, None, span, key_mask=key_mask, documents=documents, window=window)
    return _pairs(positions, past_length, attention_mask) if needs_pairs else positions


def _pairs(
    positions: Positions, past_length: int | torch.Tensor, attention_mask: torch.Tensor | None, first: int = 0
) -> Positions:
    """→ `positions` of the queries from `first` on, with the `distance` of each to each key and what is `visible`."""
    query, key = positions.query[:, first:], positions.key
    distance, span = query[:, :, None] - key[:, None, :], positions.span
    if is_tracing(key):
        # gaps that lead out of the table stop the run, never clamp
        torch._assert_async(
            (distance < span).all(), "position_ids with gaps cannot be compiled: distance >= key length"
        )
    else:
        span = max(span, int(distance.max()) + 1)
    slots = torch.arange(first, positions.query.shape[1], device=key.device) + past_length
    visible = _visible(slots, key.shape[1], positions.key_mask, positions.documents, attention_mask)
    if positions.window is not None:
        ahead = torch.arange(key.shape[1], device=key.device) > slots[:, None] - positions.window
        visible = visible & ahead
    return replace(positions, query=query, distance=distance.clamp(min=0), span=span, offset=None, visible=visible)


def _visible(
    query_slots: torch.Tensor,
    key_length: int,
    key_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
) -> torch.Tensor:
    """→ (B or 1, 1, Q, K) boolean: the keys that each query sees, by a ready mask, or by slots, padding, documents."""
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            attention_mask = attention_mask > torch.finfo(attention_mask.dtype).min / 2
        return attention_mask.any(1, keepdim=True)
    visible = (torch.arange(key_length, device=query_slots.device) <= query_slots[:, None])[None, None]
    if key_mask is not None:
        visible = visible & key_mask[:, None, None]
    if documents is not None:
        visible = visible & (documents[:, None, query_slots, None] == documents[:, None, None])
    return visible


def keep_tables(positions: Positions, cache: Cache, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Lets the single steps of a generation share their tables.

    Args:
        positions: gets its `reversed_tables`, and room for the steps to come in its `span`.
        cache: the tables live as long as these keys.
        parameters: what the tables are computed from: when they change, the tables are computed anew.
    """
    if positions.offset is None or positions.query.shape[1] > 1 or is_tracing(positions.query):
        return
    state = [(p.data_ptr(), None if p.is_inference() else p._version) for p in parameters]
    kept = _REVERSED_TABLES.get(cache)
    if kept is None or kept[0] != state:
        kept = _REVERSED_TABLES[cache] = state, {}
    positions.reversed_tables = kept[1]
    positions.span = max(64, 2 ** positions.offset.bit_length())
    positions.span = min(positions.span, positions.window or positions.span)


def _pad(key_mask: torch.Tensor | None, key_length: int) -> torch.Tensor | None:
    """(B, k) → (B, K): nothing stands in the slots behind the last query yet."""
    if key_mask is None or key_mask.shape[1] == key_length:
        return key_mask
    return torch.nn.functional.pad(key_mask, (0, key_length - key_mask.shape[1]))


def _key_positions(
    position_ids: torch.Tensor,
    padding: torch.Tensor | None,
    past_length: int | torch.Tensor,
    key_slots: torch.Tensor,
    num_dropped: int,
) -> torch.Tensor:
    """→ (B or 1, K) positions of all keys. Slots that no query may see yet get any value."""
    query_length = position_ids.shape[1]
    if isinstance(past_length, int) and past_length == 0:
        ahead = key_slots[query_length:] - (query_length - 1)
        return torch.cat((position_ids, position_ids[:, -1:] + ahead), dim=-1)
    # Only the queries' positions are known. The last one is a real token, so counting back from it is right
    last = past_length + query_length - 1
    if padding is None:
        return key_slots + (position_ids[:, -1:] - last)
    counted = padding.long().cumsum(-1) - 1
    end = num_dropped + key_slots.shape[0]
    counted = torch.cat((counted, counted[:, -1:].expand(-1, max(end - counted.shape[1], 0))), dim=-1)
    # not `as_tensor`, which makes a constant of a length that is traced
    last_slot = last + torch.zeros(1, dtype=torch.long, device=key_slots.device)
    return counted[:, num_dropped:end] + position_ids[:, -1:] - counted.index_select(1, last_slot)


def _is_contiguous(key: torch.Tensor, key_mask: torch.Tensor | None, documents: torch.Tensor | None) -> bool:
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
    return not _varies(offset, torch.ones_like(key, dtype=torch.bool) if key_mask is None else key_mask)
