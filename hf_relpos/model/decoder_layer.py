"""The blocks of the RelPos decoder. No scheme is named in this file: `scheme_base.py` has the interface.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, C hidden size.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import Cache
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs

from .attention_distance_bias import (
    check_implementation,
    distance_bias_attention,
    eager_attention_forward,
    flex_distance_attention,
    hide,
    merge_position_bias,
    row_mask,
)
from .attention_key_bias import add_key_bias, dense_key_bias, from_channels, to_channels
from .configuration_relpos import RelPosConfig
from .scheme_base import Positions
from .scheme_registry import add_biases, build_position_embeddings, layer_kinds
from .transformers_versions import add_to_cache, takes_cache


class RelPosRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states.float()
        # a product with itself: the gradient of `pow` takes twice as long on CPUs
        normed = normed * torch.rsqrt((normed * normed).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


class RelPosMLP(nn.Module):
    """C → 4C → C, without a gate."""

    def __init__(self, config: RelPosConfig) -> None:
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.up_proj(hidden_states)))


class RelPosAttention(nn.Module):
    """Causal multi-head attention with whatever the position schemes do to q, k and the scores."""

    def __init__(self, config: RelPosConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, config.hidden_size, bias=False)
        self.kind = layer_kinds(config)[layer_idx]
        self.sliding_window = self.kind.window  # where backends look for it
        self.position_embeddings = build_position_embeddings(config, layer_idx)

    def forward(
        self,
        hidden_states: torch.Tensor,  # (B, Q, C)
        shared_bias: torch.Tensor | None,  # of the schemes that layers share: (H, span), or (B or 1, H, Q, K)
        positions: Positions,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        head_shape = (*input_shape, -1, self.head_dim)
        query = self.q_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, H, Q, D)
        key = self.k_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, G, Q, D)
        value = self.v_proj(hidden_states).view(head_shape).transpose(1, 2)  # (B, G, Q, D)
        for rotate, rotation in positions.rotations:
            query, key = rotate(query, key, rotation)
        if self.kind.has_bias and query.shape[1] != self.config.num_attention_heads:
            positions = replace(positions, mesh=self._mesh(query))
        state = self._key_state(hidden_states, positions)
        if cache is not None:
            key, value, state = self._update(cache, key, value, state, kwargs)  # (B, G, K, D) twice, (B, H, K)
        if state is not None and positions.key_mask is not None:
            state = state.masked_fill(~positions.key_mask[:, None], 0.0)
        if state is not None and positions.visible is None:
            query, key, value = add_key_bias(query, key, value, state, self.scaling)
            state = None  # done: there is no bias to add

        if positions.offset is None:
            bias = self._dense_bias(shared_bias, positions, state)
            if self.kind.has_score_bias:
                bias = add_biases((bias, self._score_bias(query, key, bias, positions)))
            output, weights = self._attend_with_mask(query, key, value, bias, attention_mask, **kwargs)
        elif positions.tail is None:
            output, weights = self._attend_with_table(
                query, key, value, shared_bias, attention_mask, positions, **kwargs
            )
        else:
            output, weights = self._attend_in_two(query, key, value, shared_bias, positions, **kwargs)
        return self.o_proj(output[..., : self.head_dim].reshape(*input_shape, -1)), weights

    def _key_state(self, hidden_states: torch.Tensor, positions: Positions) -> torch.Tensor | None:
        """(B, Q, C) → (B, H, Q) fp32 or `None`."""
        state = self.position_embeddings.key_state(hidden_states)
        return None if state is None else positions.local_heads(state.transpose(0, 1)).transpose(0, 1)

    def _update(
        self,
        cache: Any,
        key: torch.Tensor,
        value: torch.Tensor,
        state: torch.Tensor | None,
        kwargs: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Adds to the cache and returns what it holds. A state is kept in further channels of the keys."""
        if state is not None:
            key = torch.cat((key, to_channels(state, key.shape[1], key.dtype)), dim=-1)
        key, value = add_to_cache(cache, key, value, self.layer_idx, kwargs)
        if state is not None:
            key, state = key[..., : self.head_dim], from_channels(key[..., self.head_dim :])
        return key, value, state

    def _mesh(self, query: torch.Tensor) -> Any:
        """The device mesh whose ranks share the heads out among them (tensor parallelism)."""
        mesh = getattr(self.q_proj.weight, "device_mesh", None)
        if mesh is not None:
            return mesh
        # a quantised weight does not say: then it must be all ranks that there are
        num_ranks = self.config.num_attention_heads // query.shape[1]
        if torch.distributed.get_world_size() != num_ranks:
            raise ValueError(
                f"`pos_embedding_type` {self.config.pos_embedding_type!r} serves quantised weights under tensor "
                f"parallelism over all ranks, {torch.distributed.get_world_size()}, got it over {num_ranks}."
            )
        return DeviceMesh.from_group(torch.distributed.group.WORLD, query.device.type)

    def _dense_bias(
        self, shared_bias: torch.Tensor | None, positions: Positions, state: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """→ (B or 1, H, Q, K) fp32 or `None`."""
        by_keys = None if state is None else dense_key_bias(state, positions.visible)
        if shared_bias is not None:
            shared_bias = positions.local_heads(shared_bias.transpose(0, 1)).transpose(0, 1)
        return add_biases((shared_bias, self.position_embeddings.bias(positions), by_keys))

    def _score_bias(
        self, query: torch.Tensor, key: torch.Tensor, bias: torch.Tensor | None, positions: Positions
    ) -> torch.Tensor | None:
        """→ (B, H, Q, K) fp32 or `None`. The kernel computes the scores once more."""
        if positions.mesh is not None:
            raise ValueError(
                f"`tp_plan` must be None for pos_embedding_type {self.config.pos_embedding_type!r}, whose bias by the "
                f"scores needs all heads in one place, got {positions.mesh.size()} ranks."
            )
        key = key.repeat_interleave(self.num_key_value_groups, dim=1)
        with torch.autocast(query.device.type, enabled=False):
            query = query.float()
            scores = query @ key.float().transpose(2, 3) * self.scaling
            return self.position_embeddings.score_bias(scores, bias, query, positions)

    def _table(self, shared_table: torch.Tensor | None, positions: Positions, query: torch.Tensor) -> torch.Tensor:
        """→ (H, span) fp32 (fp64 beside fp64), from distance 0 on."""
        table = add_biases((shared_table, self.position_embeddings.table(positions.span, query.device)))
        if table is None:  # the bias is all in the keys
            return query.new_zeros(
                query.shape[1], positions.span, dtype=torch.promote_types(query.dtype, torch.float32)
            )
        return positions.local_heads(table).to(torch.promote_types(query.dtype, torch.float32))

    def _last_row(self, shared_table: torch.Tensor | None, positions: Positions, query: torch.Tensor) -> torch.Tensor:
        """→ (H, keys) fp32, from the distance of the first key down to 0: a slice of what earlier steps left."""
        kept = positions.kept_table(self.layer_idx)
        if kept is None:
            kept = self._table(shared_table, positions, query).flip(1)
            if positions.reversed_tables is not None:
                positions.reversed_tables[self.layer_idx] = kept
        return kept[:, kept.shape[1] - positions.num_seen :]

    def _attend_with_table(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shared_table: torch.Tensor | None,
        attention_mask: Any,
        positions: Positions,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ (B, Q, H, D), and weights as `_attend_with_mask`."""
        check_implementation(self.config, self.config._attn_implementation)
        scaling, offset, key_mask = self.scaling, positions.offset, positions.key_mask
        if self.config._attn_implementation == "flex_attention":
            table = self._table(shared_table, positions, query)
            output = flex_distance_attention(self, query, key, value, table, attention_mask, offset, scaling)
        elif query.shape[2] > 1:
            output = distance_bias_attention(
                query,
                key,
                value,
                self._table(shared_table, positions, query),
                scaling=scaling,
                offset=offset,
                key_mask=key_mask,
                documents=positions.documents,
                window=positions.window,
            )
        else:  # one row of scores: any kernel that takes a mask
            seen = slice(offset + 1 - positions.num_seen, offset + 1)
            key, value = key[:, :, seen], value[:, :, seen]
            key_mask = None if key_mask is None else key_mask[:, seen]
            mask = row_mask(self._last_row(shared_table, positions, query), key_mask, query)
            return self._attend_with_mask(query, key, value, None, mask, **kwargs)
        return output.transpose(1, 2), None

    def _attend_in_two(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        shared_table: torch.Tensor | None,
        positions: Positions,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """The first queries by the table, the last ones, `positions.tail`, by a bias for each pair."""
        tail = replace(positions.tail, mesh=positions.mesh)
        first, slots = query.shape[2] - tail.query.shape[1], positions.span - tail.query.shape[1]
        rest = {
            name: None if part is None else part[:, :slots]
            for name, part in (("key_mask", positions.key_mask), ("documents", positions.documents))
        }
        head = replace(positions, tail=None, **rest)
        by_table, _ = self._attend_with_table(
            query[:, :, :first], key[:, :, :slots], value[:, :, :slots], shared_table, None, head, **kwargs
        )
        shared_bias = None if shared_table is None else shared_table[:, tail.distance].transpose(0, 1)
        bias = self._dense_bias(shared_bias, tail)
        by_pairs, _ = self._attend_with_mask(query[:, :, first:], key, value, bias, tail.visible, **kwargs)
        return torch.cat((by_table, by_pairs), dim=1), None

    def _attend_with_mask(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        attention_mask: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ (B, Q, H, D), and the (B, H, Q, K) weights from kernels that give them."""
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        if bias is not None:
            check_implementation(self.config, self.config._attn_implementation)
        flex = self.config._attn_implementation == "flex_attention"
        if flex and isinstance(attention_mask, torch.Tensor) and attention_mask.dtype == torch.bool:
            # it adds a mask that is a tensor to the scores, a boolean one too
            attention_mask = hide(query.new_zeros(()), attention_mask, query)
        if bias is not None and flex:  # indexes the bias by the row, also where all rows share one
            kwargs["position_bias"] = bias.expand(query.shape[0], -1, -1, -1)
        elif bias is not None:
            attention_mask = merge_position_bias(bias, attention_mask, query)
        return attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **(
                {} if self.sliding_window is None else {"sliding_window": self.sliding_window}
            ),  # flash attention's mask
            **kwargs,
        )


class RelPosDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: RelPosConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = RelPosAttention(config, layer_idx)
        self.post_attention_layernorm = RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = RelPosMLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout)

    @takes_cache
    def forward(
        self,
        hidden_states: torch.Tensor,
        # positional, as hidden_states: reentrant checkpointing only differentiates positional arguments
        shared_bias: torch.Tensor | None = None,
        positions: Positions | None = None,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attended, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            shared_bias,
            positions,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + self.dropout(attended)
        return hidden_states + self.dropout(self.mlp(self.post_attention_layernorm(hidden_states)))
