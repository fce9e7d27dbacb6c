"""Chooses the plan of each group of layers, once per forward, here and nowhere else.

Shape letters: B batch, H query heads, Q query length, K key length, C hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import logging

from .attention_mask import check_implementation
from .attention_native import native_is_ready
from .attention_padded import RealFirstPlan
from .attention_plan import TABLE_PLANS, AttentionPlan, KeyBiasPlan, TablePlan
from .attention_row import RowPlan
from .attention_score_bias import DensePlan, SplitPlan
from .functional_transforms import assert_async, is_batched, is_tracing, is_transformed
from .kept_steps import KeptSteps
from .key_positions import (
    KeyPositions,
    check_ready_mask,
    document_starts,
    is_contiguous,
    locate_keys,
    pad_mask,
    visible_keys,
)
from .scheme_base import Positions
from .scheme_registry import LayerGroup
from .token_positions import TokenPositions, flash_lengths, is_exported, same_document
from .transformers_versions import CACHE_NAME


logger = logging.get_logger(__name__)


class FrozenLengthCache(Cache):
    """A view of a cache whose lengths do not change with it: a static cache counts in place, and FlexAttention asks its
    mask for pairs of tokens only after the layers have moved the counter on."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=cache.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        length = super().get_seq_length(layer_idx)
        return length.clone() if isinstance(length, torch.Tensor) else length


def plan_layers(
    model: nn.Module,
    groups: Sequence[LayerGroup],
    tokens: TokenPositions,
    inputs_embeds: torch.Tensor,
    kept: KeptSteps | None = None,
) -> dict[LayerGroup, AttentionPlan]:
    """→ the plan of each group of layers.

    Args:
        model: the decoder, with `config`, `layers` and `position_embeddings`.
        groups: that of each layer.
        tokens: where the tokens of the forward stand.
        inputs_embeds: (B, Q, C).
        kept: what earlier steps of a generation left.

    Raises:
        ValueError: for an attention implementation that would drop a bias.
    """
    is_plain = kept is not None and tokens.attention_mask is None
    if is_plain and kept.plans and all(_advance(plan, layer, tokens) for layer, plan in kept.plans):
        return {plan.group: plan for _, plan in kept.plans}
    layers: dict[LayerGroup, list[int]] = {}
    for index, group in enumerate(groups):
        layers.setdefault(group, []).append(index)
    plans = {group: plan_attention(model, group, layers[group], tokens, inputs_embeds, kept) for group in layers}
    if kept is not None:
        kept.plans = [(layers[group][0], plan) for group, plan in plans.items()] if is_plain else []
    return plans


def _advance(plan: AttentionPlan, layer_idx: int, tokens: TokenPositions) -> bool:
    """Makes the plan of the last step that of this one; → whether that can be."""
    keys = locate_keys(tokens, layer_idx)
    return isinstance(keys.offset, int) and plan.advance(keys, tokens.past_length + 1)


def plan_attention(
    model: nn.Module,
    group: LayerGroup,
    layers: Sequence[int],
    tokens: TokenPositions,
    inputs_embeds: torch.Tensor,
    kept: KeptSteps | None = None,
) -> AttentionPlan:
    """How the layers of a group attend in a forward.

    Args:
        model: the decoder, with `config`, `layers` and `position_embeddings`.
        group: what the layers have in common.
        layers: their indices.
        tokens: where the tokens of the forward stand.
        inputs_embeds: (B, Q, C).
        kept: what earlier steps of a generation left.

    Raises:
        ValueError: for an attention implementation that would drop the bias of the group.
    """
    config, mask = model.config, tokens.mask_of(group.layer_type)
    implementation = config._attn_implementation
    if group.has_bias:
        check_implementation(config, implementation)
    keys = locate_keys(tokens, layers[0])
    common = {"group": group, "implementation": implementation, "schemes": model.position_embeddings}
    common |= {"key_mask": keys.mask}
    # extra dimensions of queries and keys hold numbers per key, where the scores are not needed for each pair
    is_ready = mask is not None and mask.ndim == 4  # and shows whatever it shows
    in_extra_dims = implementation == "sdpa" and not is_ready
    is_dense = group.has_pair_bias or (group.has_key_bias and not in_extra_dims)
    last = _last_table_position(model, group, layers, inputs_embeds)
    if not is_dense and last < 0:
        return _plan_mask(model, tokens, inputs_embeds, common)
    key_positions = keys.positions(tokens)
    table = None
    if last >= 0 and isinstance(keys.offset, int) and tokens.padding is mask:
        attention = [model.layers[index].self_attn for index in layers]
        of_row = {"layers": [each.layer_idx for each in attention], "last_position": last}
        of_row |= {"layer": attention[0], "kept": None if kept is None else kept.tables}
        table = _plan_table(model, of_row, keys, key_positions, tokens, inputs_embeds, common)
    # counted from the first token, which layers with a window may have dropped
    slots = tokens.past_length + inputs_embeds.shape[1]
    if table is not None and (last == math.inf or slots <= last + 1):
        return table
    if not is_dense:
        return _plan_mask(model, tokens, inputs_embeds, common)
    first = max(math.floor(last) + 1 - tokens.past_length, 0) if table is not None else 0
    positions, span = _pair_positions(keys, key_positions, tokens, mask, group, first)
    if implementation == "sdpa":
        _warn_of_dense_bias(model, group, tokens, is_late=table is not None)
    offset = None if is_ready or not isinstance(keys.offset, int) else keys.offset + first
    dense = DensePlan(**common, positions=positions, span=span, offset=offset)
    if first == 0:
        dense.mask = make_mask(model, group, tokens, inputs_embeds, mask, allow_is_causal_skip=False)
        return dense
    dense.mask = positions.visible
    first_slots = keys.offset + first
    key_mask, documents = (None if x is None else x[:, :first_slots] for x in (table.key_mask, table.documents))
    return SplitPlan(**common, first=replace(table, key_mask=key_mask, documents=documents), last=dense)


def example_embeds(embed_tokens: nn.Module, length: int) -> torch.Tensor:
    """→ (1, length, C) on the device of a forward: offloaded parameters are on none until they are used."""
    device = embed_tokens.weight.device
    device = "cpu" if device.type == "meta" and hasattr(embed_tokens, "_hf_hook") else device
    return embed_tokens(torch.zeros(1, length, dtype=torch.long, device=device))


def make_mask(
    model: nn.Module,
    group: LayerGroup,
    tokens: TokenPositions,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    allow_is_causal_skip: bool = True,
) -> Any:
    """→ the mask of a group of layers, as their attention implementation takes it; `None` where it needs none."""
    cache = tokens.cache
    if model.config._attn_implementation == "flex_attention" and cache is not None and cache.is_compileable:
        cache = FrozenLengthCache(cache)
    create = create_causal_mask if group.window is None else create_sliding_window_causal_mask
    return create(
        config=model.config,
        inputs_embeds=inputs_embeds,
        attention_mask=attention_mask,
        **{CACHE_NAME: cache},
        and_mask_function=None if tokens.documents is None else same_document(tokens.documents),
        allow_is_causal_skip=allow_is_causal_skip and not is_batched(attention_mask),
    )


def _last_table_position(
    model: nn.Module, group: LayerGroup, layers: Sequence[int], inputs_embeds: torch.Tensor
) -> float:
    """The last position of a query whose whole bias a table of the distances holds; −1 if there is no such query."""
    config = model.config
    plan_class = TABLE_PLANS.get(config._attn_implementation)
    drops = model.training and config.attention_dropout > 0
    if plan_class is None or drops or is_exported(inputs_embeds):
        return -1.0
    if not group.has_bias and not _is_faster_by_zeros(config._attn_implementation, inputs_embeds):
        return -1.0
    if group.has_key_bias and not plan_class.supports_key_bias:
        return -1.0
    # a key bias makes many weights below 2^−126, which slow torch's CPU kernel several times, and ours not: such
    # schemes get a table of zeros
    is_zero_table = not group.has_pair_bias and inputs_embeds.device.type == "cpu"
    if not group.has_distance_table and not is_zero_table:
        return -1.0
    if "max_table_position" not in group.hooks:
        return math.inf
    schemes = chain(*(model.layers[index].self_attn.position_embeddings.values() for index in layers))
    limits = [scheme("max_table_position") for scheme in schemes if "max_table_position" in scheme.hooks]
    # one look at the device for all layers; a traced graph cannot inspect values, and FlexAttention takes all queries
    # at once
    if plan_class.needs_mask or is_tracing(limits[0]):
        return -1.0
    return float(torch.stack(limits).min())


def _is_faster_by_zeros(implementation: str, inputs_embeds: torch.Tensor) -> bool:
    """Whether attention without a bias is faster with a table of zeros: in training in bf16 on CPUs, where the backward
    pass of torch's own kernel takes several times as long as the native one."""
    if implementation != "sdpa" or inputs_embeds.device.type != "cpu" or inputs_embeds.shape[1] == 1:
        return False
    if not torch.is_grad_enabled() or is_tracing(inputs_embeds) or is_transformed():
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else inputs_embeds.dtype
    return dtype == torch.bfloat16 and native_is_ready()


def _plan_mask(
    model: nn.Module, tokens: TokenPositions, inputs_embeds: torch.Tensor, common: dict[str, Any]
) -> AttentionPlan:
    """→ the plan with a mask, and with numbers per key if the group has any."""
    group, keywords = common["group"], {}
    mask = make_mask(model, group, tokens, inputs_embeds, tokens.mask_of(group.layer_type))
    if tokens.documents is not None and "flash" in common["implementation"]:
        keywords = flash_lengths(tokens.documents, mask, inputs_embeds.shape[0])
    plan_class = KeyBiasPlan if group.has_key_bias else AttentionPlan
    return plan_class(**common, mask=mask, keywords=keywords)


def _plan_table(
    model: nn.Module,
    of_row: dict[str, Any],
    keys: KeyPositions,
    key_positions: torch.Tensor,
    tokens: TokenPositions,
    inputs_embeds: torch.Tensor,
    common: dict[str, Any],
) -> TablePlan | None:
    """→ the plan with a table, or `None` where distances are not those of the slots.

    Args:
        of_row: what a `RowPlan` has beside the others.
    """
    group, query_length = common["group"], inputs_embeds.shape[1]
    slots = keys.offset + query_length
    seen_mask = None if keys.mask is None else keys.mask[:, :slots]
    # a traced graph cannot inspect values
    by_construction = (tokens.is_counted or query_length == 1) and tokens.padding is None and tokens.documents is None
    plan_class, keywords = TABLE_PLANS[common["implementation"]], {}
    if by_construction or not is_tracing(key_positions):
        if not by_construction and not is_contiguous(key_positions[:, :slots], seen_mask, tokens.documents):
            return None
        if query_length == 1 and not plan_class.needs_mask:
            plan_class, keywords = RowPlan, of_row
    elif plan_class.needs_mask or not _may_be_sorted(tokens, keys, group):
        return None
    else:
        plan_class, keywords = RealFirstPlan, RealFirstPlan.sort(seen_mask)
    plan = plan_class(
        **{**common, "layer": of_row["layer"], **keywords, "key_mask": pad_mask(seen_mask, keys.length)},
        device=inputs_embeds.device,
        dtype=inputs_embeds.dtype,
        offset=keys.offset,
        span=min(slots, group.window or slots),
        documents=tokens.documents,
    )
    if plan_class.needs_mask:
        plan.mask = make_mask(model, group, tokens, inputs_embeds, tokens.mask_of(group.layer_type))
    if of_row["kept"] is not None:  # room for the steps to come
        plan.span = max(64, 2 ** keys.offset.bit_length())
        plan.span = min(plan.span, group.window or plan.span)
    return plan


def _may_be_sorted(tokens: TokenPositions, keys: KeyPositions, group: LayerGroup) -> bool:
    """Whether in a graph the real tokens of each row can be put first, so that distances are those of the slots."""
    is_whole = keys.length == tokens.position_ids.shape[1] and isinstance(keys.offset, int) and keys.offset == 0
    is_counted = tokens.is_counted and tokens.padding is not None and tokens.documents is None
    # a window counts slots, padding among them; `torch.func.vmap` has another kernel
    return is_whole and is_counted and group.window is None and not is_batched(tokens.padding)


def _pair_positions(
    keys: KeyPositions,
    key_positions: torch.Tensor,
    tokens: TokenPositions,
    mask: torch.Tensor | None,
    group: LayerGroup,
    first: int,
) -> tuple[Positions, int]:
    """→ positions and distances of the queries from `first` on to all keys, and an upper bound of the distances."""
    query = tokens.position_ids[:, first:]
    distance = query[:, :, None] - key_positions[:, None, :]
    span = max(keys.length + keys.num_dropped, tokens.span or 0)
    if is_tracing(key_positions):
        # gaps beyond the table raise an error instead of being clamped
        assert_async((distance < span).all(), "position_ids with gaps cannot be compiled: distance >= key length")
    else:
        span = max(span, int(distance.max()) + 1)
    slots = torch.arange(first, tokens.position_ids.shape[1], device=query.device) + keys.offset
    visible = visible_keys(slots, keys, tokens.documents, mask, group.window)
    is_first = isinstance(tokens.past_length, int) and tokens.past_length == 0
    if mask is not None and mask.ndim == 4 and not is_first and group.has_position_bias:
        check_ready_mask(visible, key_positions, tokens.position_ids)
    starts = None if group.window is None else document_starts(tokens)
    starts = starts[:, first:] if starts is not None and starts.shape[1] > 1 else starts
    return Positions(query, key_positions, distance.clamp(min=0), visible, starts), span


def _warn_of_dense_bias(model: nn.Module, group: LayerGroup, tokens: TokenPositions, is_late: bool) -> None:
    """Says why a bias that is a function of the distance is computed for every pair.

    Args:
        is_late: whether the distances are those of the slots, but some queries stand too late for the table.
    """
    if not group.has_distance_table or is_tracing(tokens.position_ids):
        return
    if model.training and model.config.attention_dropout > 0:
        reason = f"`attention_dropout` is {model.config.attention_dropout}"
    elif tokens.padding is not tokens.attention_mask:
        reason = "`attention_mask` has 4 dimensions"
    elif is_late:
        reason = "it is no function of the distance alone at all of these positions"
    else:
        reason = "the positions skip numbers, or padding stands between tokens"
    logger.warning_once(
        f"The position bias is computed for each pair of tokens, which takes more time and memory: {reason}."
    )
