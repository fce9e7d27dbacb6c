"""Where tokens stand: positions, padding, documents of packed rows.

Shape letters: B batch, Q query length, K key length.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from .functional_transforms import is_traced, is_tracing
from .position_augmentation import sample_positions


@dataclass(frozen=True)
class TokenPositions:
    """Where the tokens of one forward stand, the same for all layers.

    Attributes:
        position_ids: (B or 1, Q), integers counted over real tokens.
        attention_mask: (B, K), 0 on padding; a ready (B, 1, Q, K) mask; a dictionary of ready masks by layer type; or
            `None`, where nothing is hidden but the future.
        documents: (B or 1, Q) document indices of packed rows, or `None`.
        cache: the keys of earlier tokens, before this forward adds to them, or `None`.
        past_length: number of tokens in it; taken before the update, which changes a static cache's counter in place.
        cacheable: whether a cache may hold these tokens.
        is_counted: whether the positions were counted here, so that they follow the slots.
        span: an upper bound of the positions where they may skip numbers, else `None`.
    """

    position_ids: torch.Tensor
    attention_mask: Any
    documents: torch.Tensor | None
    cache: Cache | None
    past_length: int | torch.Tensor
    cacheable: bool
    is_counted: bool
    span: int | None

    @property
    def lone_position(self) -> int | None:
        """The one position of all queries, where it can be known without a wait for a device."""
        if self.is_counted and self.attention_mask is None and isinstance(self.past_length, int):
            return self.past_length
        position_ids = self.position_ids
        is_one = position_ids.numel() == 1 and position_ids.is_cpu and not position_ids.is_floating_point()
        return int(position_ids) if is_one else None

    @property
    def padding(self) -> torch.Tensor | None:
        """(B, K) mask, 0 on padding, or `None`."""
        mask = self.attention_mask
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    @property
    def lengths(self) -> torch.Tensor | None:
        """(B or 1, Q): the length of the document of each token, by its last position; `None` in rows of one."""
        if self.documents is None:
            return None
        positions, documents = torch.broadcast_tensors(self.position_ids, self.documents)
        highest = torch.zeros_like(positions).scatter_reduce(1, documents, positions, "amax")
        return highest.gather(1, documents) + 1

    def mask_of(self, layer_type: str) -> torch.Tensor | None:
        """The mask for layers of a type."""
        return self.attention_mask.get(layer_type) if isinstance(self.attention_mask, dict) else self.attention_mask


def locate_tokens(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
    groups: Iterable[Any],
    training: bool,
) -> TokenPositions:
    """Reads what a forward was given about positions.

    Args:
        config: of the model.
        inputs_embeds: (B, Q, C).
        attention_mask, position_ids, cache: as in `RelPosModel.forward`.
        groups: the `LayerGroup` of each layer.
        training: whether positions may be drawn at random.

    Raises:
        ValueError: for a mask that does not fit, or for a cache with positions that it may not hold.
    """
    (batch_size, query_length, _), past_length = inputs_embeds.shape, cached_length(cache)
    check_mask(attention_mask, batch_size, query_length, past_length)
    attention_mask = simplify_mask(attention_mask)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and config.sliding_window:
        raise ValueError(
            "`attention_mask` of 4 dimensions must be a dictionary with a mask for each of `layer_types` where "
            f"some layers have a `sliding_window`, got a tensor of shape {tuple(attention_mask.shape)}."
        )
    mask = next(iter(attention_mask.values())) if isinstance(attention_mask, dict) else attention_mask
    documents, cacheable, is_counted, span = None, True, position_ids is None, None
    if is_counted:
        position_ids = count_positions(mask, past_length, query_length, inputs_embeds.device)
    elif mask is None or mask.ndim == 2:  # a ready mask says nothing about positions
        documents, cacheable = inspect_positions(position_ids, mask, past_length, cache is not None, groups)
    if training and config.position_sampling is not None and cache is None:
        span, is_counted, cacheable = config.max_position_embeddings, False, False
        position_ids = sample_positions(config.position_sampling, position_ids, mask, documents, batch_size, span)
    if training and config.position_start_augmentation and cache is None:
        cacheable = False  # later tokens would stand elsewhere
    return TokenPositions(position_ids, attention_mask, documents, cache, past_length, cacheable, is_counted, span)


def is_exported(tensor: torch.Tensor) -> bool:
    """Whether the graph is exported to runtimes that know only the operators of torch."""
    return is_traced(tensor) and (torch.compiler.is_exporting() or not torch.compiler.is_dynamo_compiling())


def cached_length(cache: Cache | None) -> int | torch.Tensor:
    """The number of tokens in a cache."""
    length = cache.get_seq_length() if cache is not None else 0
    if isinstance(length, torch.Tensor):  # a static cache counts in place
        length = length.clone() if is_tracing(length) else int(length)
    return length


def check_mask(
    attention_mask: torch.Tensor | None, batch_size: int, query_length: int, past_length: int | torch.Tensor
) -> None:
    """Raises `ValueError` for a mask that does not fit: attention would silently use the wrong keys."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim == 4:
        return  # a ready mask is applied unchanged
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
    is_plain = attention_mask is None or attention_mask.ndim != 2
    if is_plain and query_length == 1 and isinstance(past_length, int):  # a cached step
        return torch.full((1, 1), past_length, device=device)
    slots = past_length + torch.arange(query_length, device=device)
    if is_plain:
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
    groups: Iterable[Any],
) -> tuple[torch.Tensor | None, bool]:
    """What given positions mean: the documents of a packed row, and whether later tokens can be cached after them.

    Args:
        position_ids: (B or 1, Q).
        attention_mask: (B, K), 0 on padding, or `None`.
        past_length: number of tokens in the cache.
        has_cache: whether there is one.
        groups: the `LayerGroup` of each layer; a position bias needs the positions of cached keys, which are found
            again by counting.

    Returns:
        (B or 1, Q) document indices or `None`, see `find_documents`, and whether a cache may hold these tokens.

    Raises:
        ValueError: if a cache is given that may not hold these tokens.
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
    needs_distance = any(group.has_position_bias for group in groups)
    cacheable = documents is None and not (needs_distance and _has_gaps(position_ids, recent))
    if has_cache and not cacheable:
        raise ValueError(
            "`cache` must be None for packed sequences (`position_ids` that restart) and, with a "
            "position bias, for positions that skip numbers."
        )
    return documents, cacheable


def _has_gaps(position_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> bool:
    """Whether positions skip numbers between the real tokens of a row."""
    if attention_mask is None:
        return bool((position_ids.diff(dim=-1) != 1).any())
    real = attention_mask.bool()
    return bool(varying(position_ids - real.long().cumsum(-1), real).any())


def varying(offset: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Whether (B or 1, N) numbers differ between the real tokens of each row: (B,)."""
    lowest = torch.where(real, offset, offset.max()).amin(-1)
    highest = torch.where(real, offset, offset.min()).amax(-1)
    return lowest < highest


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
        ValueError: if there is a mask, which flash attention would use instead of the documents.
    """
    if attention_mask is not None:
        raise ValueError("`attention_mask` must be None for packed sequences with flash attention.")
    documents = documents.expand(batch_size, -1)
    starts = torch.cat((torch.ones_like(documents[:, :1]), documents.diff(dim=-1)), dim=-1).flatten().nonzero()[:, 0]
    bounds = torch.cat((starts, starts.new_tensor([documents.numel()]))).to(torch.int32)
    longest = int(bounds.diff().max())
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest, "max_length_k": longest}
