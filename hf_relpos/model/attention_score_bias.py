"""Attention with a bias that is computed for each score, where no table of the distances holds it: for a few queries at
a time, so that no layer holds a (Q, K) matrix per head.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from .attention_key_bias import dense_key_bias
from .attention_plan import AttentionInputs, AttentionPlan, TablePlan, mask_key_bias
from .functional_transforms import is_tracing, is_transformed
from .key_positions import KeyPositions
from .scheme_base import Positions
from .scheme_registry import add_biases


# scores that exist at a time where a bias is computed for each of them: what the cache of a CPU holds; more on a GPU,
# which has to launch each chunk, and with gradients, where each is computed twice and short rows shall be one
CACHED_SCORES, CHUNK_SCORES = 2**18, 2**22


@dataclass(kw_only=True)
class DensePlan(AttentionPlan):
    """Attention with a mask and a bias for each score, where no table of the distances holds the bias.

    Attributes:
        positions: of queries and keys.
        span: exclusive upper bound of the distances.
        offset: the key slot of the first query, where a query sees no key after it; `None` where it may.
    """

    positions: Positions
    span: int
    offset: int | None = None

    @property
    def name(self) -> str:
        return f"{self.implementation}:dense_bias"

    def advance(self, keys: KeyPositions, num_slots: int) -> bool:
        return False

    def shared_bias(self) -> torch.Tensor | None:
        """→ (B or 1, H, Q, K) fp32 or `None`."""
        names = self.group.schemes
        tables = self.schemes.pair_tables(self.positions, self.span, names=names)
        return self.schemes.dense_bias(self.positions, tables, names=names)

    def attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if shared_bias is not None:
            shared_bias = inputs.shard_heads(shared_bias.transpose(0, 1)).transpose(0, 1)
        tables = layer.position_embeddings.pair_tables(self.positions, self.span, inputs.shard_heads)
        total, num_queries = inputs.query.shape[2], self._num_queries_at_a_time(inputs)
        if num_queries >= total:
            return self._attend(layer, inputs, shared_bias, tables, **kwargs)
        outputs = []
        for start in range(0, total, num_queries):
            end = start + num_queries
            queries, keys = slice(start, end), slice(None if self.offset is None else self.offset + end)
            bias = None if shared_bias is None else shared_bias[..., queries, keys]
            attend = partial(self._take(queries, keys)._attend, layer, **kwargs)
            if torch.is_grad_enabled():  # the scores of all queries would be kept for the gradients
                attend = partial(checkpoint, attend, use_reentrant=False)
            outputs.append(attend(inputs.take(queries, keys), bias, tables)[0])
        return torch.cat(outputs, dim=1), None

    def _num_queries_at_a_time(self, inputs: AttentionInputs) -> int:
        """So that memory does not grow with Q: each query is by itself. Eager attention returns all weights, and
        FlexAttention, graphs and transforms take all queries at once."""
        batch_size, num_heads, num_queries, _ = inputs.query.shape
        if self.implementation != "sdpa" or is_tracing(inputs.query) or is_transformed():
            return num_queries
        is_cached = inputs.query.device.type == "cpu" and not torch.is_grad_enabled()
        num_scores = CACHED_SCORES if is_cached else CHUNK_SCORES
        return max(num_scores // (batch_size * num_heads * inputs.key.shape[2]), 1)

    def _take(self, queries: slice, keys: slice) -> "DensePlan":
        """The plan of some queries and keys."""
        mask, key_mask = self.mask[..., queries, keys], None if self.key_mask is None else self.key_mask[:, keys]
        return replace(self, mask=mask, key_mask=key_mask, positions=self.positions.take(queries, keys))

    def _attend(
        self,
        layer: nn.Module,
        inputs: AttentionInputs,
        shared_bias: torch.Tensor | None,
        tables: dict[str, torch.Tensor],
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        of_layer = layer.position_embeddings.dense_bias(self.positions, tables, inputs.shard_heads)
        of_keys = None
        if inputs.key_bias is not None:
            of_keys = dense_key_bias(mask_key_bias(inputs.key_bias, self.key_mask), self.positions.visible)
        bias = add_biases((shared_bias, of_layer, of_keys))
        if self.group.has_score_bias:
            bias = add_biases((bias, layer.score_bias(inputs.query, inputs.key, bias, self.positions)))
        return self._call(layer, inputs, self.mask, bias, **kwargs)


@dataclass(kw_only=True)
class SplitPlan(AttentionPlan):
    """The first queries by a table, the last ones by a dense (Q, K) bias.

    Attributes:
        first: the plan of the first queries, over the slots up to the last query.
        last: the plan of the last queries.
    """

    first: TablePlan
    last: DensePlan

    @property
    def name(self) -> str:
        return f"{self.first.name}+{self.last.name}"

    def advance(self, keys: KeyPositions, num_slots: int) -> bool:
        return False

    def shared_bias(self) -> torch.Tensor | None:
        """→ (H, span) fp32 or `None`."""
        return self.first.shared_bias()

    def attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = inputs.with_key_bias_in_extra_dims(self.key_mask, layer.scaling)
        num_first = inputs.query.shape[2] - self.last.positions.query.shape[1]
        slots = self.first.offset + num_first
        query, key, value = inputs.query[:, :, :num_first], inputs.key[:, :, :slots], inputs.value[:, :, :slots]
        head, _ = self.first.attend(layer, inputs._replace(query=query, key=key, value=value), shared_bias, **kwargs)
        if shared_bias is not None:
            # a window hides what is further away than the table reaches
            distance = self.last.positions.distance.clamp(max=shared_bias.shape[1] - 1)
            shared_bias = shared_bias[:, distance].transpose(0, 1)
        tail_inputs = inputs._replace(query=inputs.query[:, :, num_first:])
        tail, _ = self.last.attend(layer, tail_inputs, shared_bias, **kwargs)
        return torch.cat((head, tail), dim=1), None
