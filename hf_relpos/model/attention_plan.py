"""What the layers of each kind get, where layers differ: positions, masks, and the biases that they share.

Shape letters: B batch, H query heads, Q query length, K key length, C hidden size.
"""

import math
from itertools import chain
from typing import Any

import torch
from transformers import Cache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing

from .attention_distance_bias import table_kernel
from .attention_key_bias import check_cache
from .position_augmentation import sample_positions
from .scheme_base import Positions
from .scheme_registry import LayerKind
from .token_positions import build_positions, count_positions, inspect_positions, is_exported, same_document
from .transformers_versions import CACHE_NAME


logger = logging.get_logger(__name__)


class StillCache(Cache):
    """A view of a cache whose lengths do not change with it: a static cache counts in place, and FlexAttention asks its
    mask for pairs of tokens only when the layers have moved the counter on."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(layers=cache.layers)

    def get_seq_length(self, layer_idx: int = 0) -> int | torch.Tensor:
        length = super().get_seq_length(layer_idx)
        return length.clone() if isinstance(length, torch.Tensor) else length


class KindsOfLayers:
    """The part of a model that goes by the kinds of its layers: what a layer sees, and which schemes act in it."""

    def attention_path(self) -> str:
        """What computes the attention over rows without gaps in their positions, on this device and in this mode.

        Returns:
            "eager", "sdpa", "flex_attention", ..: the implementation of transformers of that name, without a bias;
            "sdpa" hides the future by `is_causal` where no row has padding. With a position bias:
            "distance_bias:triton" or "distance_bias:blocks": `distance_bias_attention`, on a table of the distances,
            by a Triton kernel or in torch operations; "distance_bias:key_bias": the same for a fixed line in bf16, as a
            value per key, where a CPU is fast in bf16;
            "flex_attention:table": FlexAttention, which reads the table;
            "sdpa:key_bias": "sdpa" with further channels, in which the keys hold their bias, as they do beside a table;
            "eager:dense_bias", "sdpa:dense_bias", ..: that implementation, with a bias for each pair of tokens.
            Where layers differ, what they have, in the order of the layers, joined by "/".
        """
        return "/".join(dict.fromkeys(self._kind_path(kind) for kind in self._kinds()))

    def _kinds(self) -> dict[LayerKind, list[int]]:
        """The kinds of layers that there are → the indices of those layers."""
        kinds: dict[LayerKind, list[int]] = {}
        for index, layer in enumerate(self.base_model.layers[: self.config.num_hidden_layers]):
            kinds.setdefault(layer.self_attn.kind, []).append(index)
        return kinds

    def _kind_path(self, kind: LayerKind) -> str:
        implementation = self.config._attn_implementation
        if not kind.has_bias:
            return implementation
        if self._table_limit(kind) < 0:
            by_keys = implementation == "sdpa" and not kind.has_pair_bias
            return f"{implementation}:key_bias" if by_keys else f"{implementation}:dense_bias"
        if implementation == "flex_attention":
            return "flex_attention:table"
        is_autocast = torch.is_autocast_enabled(self.device.type)
        dtype = torch.get_autocast_dtype(self.device.type) if is_autocast else self.dtype
        query, layer = torch.empty(0, device=self.device, dtype=dtype), self._kinds()[kind][0]
        table = self.base_model.distance_bias(64)[layer] if kind.has_table else query.new_zeros(1, 64)
        kernel = table_kernel(query, table)
        return "distance_bias:blocks" if kernel == "key_bias" and kind.window else f"distance_bias:{kernel}"

    def _table_limit(self, kind: LayerKind) -> float:
        """The largest position of a query that is served by a table of the distances; −1 if none is."""
        implementation, drops = self.config._attn_implementation, self.training and self.config.attention_dropout > 0
        readers = ("sdpa",) if kind.has_key_state else ("sdpa", "flex_attention")
        # weights below 2^−126, of which a bias in the keys makes many, take torch's kernel for CPUs several times as
        # long, and ours not: a table of zeros
        has_table = kind.has_table or (not kind.has_pair_bias and self.device.type == "cpu")
        if not kind.has_bias or not has_table or implementation not in readers or drops:
            return -1.0
        layers = [self.base_model.layers[index] for index in self._kinds()[kind]]
        schemes = chain(*(layer.self_attn.position_embeddings.values() for layer in layers))
        limits = [limit for limit in (scheme.table_limit() for scheme in schemes) if limit is not None]
        if not limits:
            return math.inf
        # one look at the device for all layers; a graph cannot look, and FlexAttention takes all queries at once
        return -1.0 if implementation == "flex_attention" or is_tracing(limits[0]) else float(torch.stack(limits).min())

    def _needs_pairs(self, kind: LayerKind, attention_mask: torch.Tensor | None) -> bool:
        """Whether the scores need something for each pair of a query and a key, where no table serves them."""
        in_channels = self.config._attn_implementation == "sdpa" and not (
            attention_mask is not None and attention_mask.ndim == 4
        )
        return kind.has_pair_bias or (kind.has_key_state and not in_channels)

    def _tell_of_dense_bias(
        self, attention_mask: torch.Tensor | None, positions: Positions, table_limit: float
    ) -> None:
        if not self.config.has_distance_table or is_tracing(positions.query):
            return
        if self.training and self.config.attention_dropout > 0:
            reason = f"`attention_dropout` is {self.config.attention_dropout}"
        elif attention_mask is not None and attention_mask.ndim == 4:
            reason = "`attention_mask` has 4 dimensions"
        elif positions.tail is not None or positions.span > table_limit + 1:
            reason = "it is no function of the distance alone at all of these positions"
        else:
            reason = "the positions leave numbers out, or padding stands between tokens"
        logger.warning_once(
            f"The position bias is computed for each pair of tokens, which takes more time and memory: {reason}."
        )

    def _place(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        past_length: int | torch.Tensor,
    ) -> tuple[dict[LayerKind, Positions], bool]:
        """→ where queries and keys stand in each kind of layers, and whether a cache may hold these tokens."""
        config, (batch_size, query_length, _), ready = self.config, inputs_embeds.shape, attention_mask
        check_cache(config, cache)
        if isinstance(attention_mask, dict):  # ready masks of several kinds, which say nothing about positions
            attention_mask = next(iter(attention_mask.values()))
        elif isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and config.sliding_window:
            raise ValueError(
                "`attention_mask` of 4 dimensions must be a dictionary with a mask for each of `layer_types` where "
                f"some layers have a `sliding_window`, got a tensor of shape {tuple(attention_mask.shape)}."
            )
        documents, cacheable, is_counted, span = None, True, position_ids is None, None
        if is_counted:
            position_ids = count_positions(attention_mask, past_length, query_length, inputs_embeds.device)
        elif attention_mask is None or attention_mask.ndim == 2:
            documents, cacheable = inspect_positions(
                position_ids, attention_mask, past_length, cache is not None, config.reads_distance
            )
        if self.training and config.position_sampling is not None and cache is None:
            span, is_counted, cacheable = config.max_position_embeddings, False, False
            drawing = (attention_mask, documents, batch_size, span)
            position_ids = sample_positions(config.position_sampling, position_ids, *drawing)
        placed = {}
        for kind, layers in self._kinds().items():
            table_limit = self._table_limit(kind)
            positions = placed[kind] = build_positions(
                position_ids,
                ready.get(kind.layer_type) if isinstance(ready, dict) else ready,
                documents,
                cache,
                past_length,
                needs_pairs=self._needs_pairs(kind, attention_mask),
                table_limit=-1.0 if is_exported(inputs_embeds) else table_limit,
                is_counted=is_counted,
                span=span,
                layer_idx=layers[0],
                window=kind.window,
            )
            if (positions.visible is not None or positions.tail is not None) and config._attn_implementation == "sdpa":
                self._tell_of_dense_bias(attention_mask, positions, table_limit)
        return placed, cacheable

    def _mask(
        self,
        kind: LayerKind,
        positions: Positions,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | dict[str, torch.Tensor | None] | None,
        cache: Cache | None,
    ) -> Any:
        """→ the mask of a kind of layers, as their attention implementation takes it; `None` where it needs none."""
        if positions.offset is not None and self.config._attn_implementation != "flex_attention":
            return None
        is_lazy = self.config._attn_implementation == "flex_attention"
        if is_lazy and cache is not None and cache.is_compileable:
            cache = StillCache(cache)
        create = create_causal_mask if kind.window is None else create_sliding_window_causal_mask
        return create(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask.get(kind.layer_type) if isinstance(attention_mask, dict) else attention_mask,
            **{CACHE_NAME: cache},
            and_mask_function=None if positions.documents is None else same_document(positions.documents),
            allow_is_causal_skip=positions.visible is None,
        )

    def _shared_bias(self, kind: LayerKind, positions: Positions, layer_idx: int) -> torch.Tensor | None:
        """→ what the schemes that layers share add to the scores: (H, span), or (B or 1, H, Q, K), or `None`."""
        if positions.offset is None:
            return self.position_embeddings.bias(positions, kind.schemes)
        if positions.kept_table(layer_idx) is not None:
            return None
        return self.position_embeddings.table(positions.span, positions.query.device, kind.schemes)
