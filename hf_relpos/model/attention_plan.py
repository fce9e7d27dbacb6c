"""How the layers of a group attend in one forward: a plan has a name and computes attention; layers need not know the
kernel. `attention_planner.py` chooses it. To add a way to attend, add an `AttentionPlan`; a kernel for a table of
the distances is a `TableKernel`.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, C hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_distance_bias import NotFiniteError, distance_bias_attention, flex_distance_attention
from .attention_kernel import TableCall, select_kernel
from .attention_key_bias import add_key_bias
from .attention_mask import hide, merge_position_bias
from .functional_transforms import is_differentiated_again, is_transformed
from .key_positions import KeyPositions
from .scheme_registry import LayerGroup, PositionEmbeddings, add_biases


class AttentionInputs(NamedTuple):
    """What one layer brings to its plan.

    Attributes:
        query: (B, H, Q, D), rotated.
        key, value: (B, G, K, D), including the cached ones.
        key_bias: (B, H, K) fp32, what the keys add to the bias of earlier keys; `None` if no scheme has any.
        shard_heads: (H, ..) values of all heads → those of this rank, where tensor parallelism shares heads out.
        attention_interface: the attention function of the plan's implementation, but for what every call gives it:
            query, key, value, mask and keywords → (B, Q, H, D) and weights.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    key_bias: torch.Tensor | None
    shard_heads: Callable[[torch.Tensor], torch.Tensor]
    attention_interface: Callable

    def take(self, queries: slice, keys: slice) -> "AttentionInputs":
        """Those of some queries and keys."""
        key_bias = None if self.key_bias is None else self.key_bias[..., keys]
        key, value = self.key[:, :, keys], self.value[:, :, keys]
        return self._replace(query=self.query[:, :, queries], key=key, value=value, key_bias=key_bias)

    def with_key_bias_in_extra_dims(self, key_mask: torch.Tensor | None, scaling: float) -> "AttentionInputs":
        """The same with the key bias in extra dimensions of queries and keys, for kernels that know no bias."""
        if self.key_bias is None:
            return self
        key_bias = mask_key_bias(self.key_bias, key_mask)
        query, key, value = add_key_bias(self.query, self.key, self.value, key_bias, scaling)
        return self._replace(query=query, key=key, value=value, key_bias=None)


def mask_key_bias(key_bias: torch.Tensor, key_mask: torch.Tensor | None) -> torch.Tensor:
    """(B, H, K), 0 on padding."""
    return key_bias if key_mask is None else key_bias.masked_fill(~key_mask[:, None], 0.0)


def _move(value: Any, device: torch.device | str | int, kwargs: dict[str, Any]) -> Any:
    """→ what is no module, on a device."""
    if isinstance(value, torch.device):
        return torch.device(device)
    return value.to(device, **kwargs) if hasattr(value, "to") and not isinstance(value, nn.Module) else value


# --- the plans


@dataclass(kw_only=True)
class AttentionPlan:
    """Attention with a mask and without a bias.

    Attributes:
        group: the schemes and the window of the layers.
        implementation: the attention implementation of transformers.
        schemes: those that layers share.
        mask: as that implementation takes it; `None` where it needs none.
        key_mask: (B, K) boolean, False on padding, or `None`.
        keywords: of the attention function, beside those that the caller gives.
    """

    group: LayerGroup
    implementation: str
    schemes: PositionEmbeddings
    mask: Any = None
    key_mask: torch.Tensor | None = None
    keywords: dict[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "AttentionPlan":
        """The same on another device: accelerate moves what a layer is given to where its parameters are."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: _move(value, device, kwargs) for name, value in values.items()}
        moved["keywords"] = {name: _move(value, device, kwargs) for name, value in self.keywords.items()}
        return replace(self, **moved)

    @property
    def name(self) -> str:
        """What `attention_path` returns."""
        return self.implementation

    def shared_bias(self) -> torch.Tensor | None:
        """What the schemes that layers share add to the scores, computed once per forward."""
        return None

    def advance(self, keys: KeyPositions, num_slots: int) -> bool:
        """Makes the plan of one token that of the next one; → whether that can be.

        Args:
            keys: those that the next token sees, without padding among them.
            num_slots: how many tokens there are with it, those that a window has dropped among them.
        """
        is_whole = keys.length == keys.offset + 1 and (self.group.window is None or keys.length < self.group.window)
        return is_whole and self.mask is None and self.key_mask is None and not self.keywords

    def attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """→ (B, Q, H, ≥ D), of which the first D channels count, and (B, H, Q, K) weights from kernels that have them.

        Args:
            layer: the attention layer; its own schemes are `layer.position_embeddings`.
            inputs: queries, keys and values.
            shared_bias: what `shared_bias` returned.
            **kwargs: of the attention function.
        """
        return self._call(layer, inputs, self.mask, **kwargs)

    def _call(
        self, layer: nn.Module, inputs: AttentionInputs, mask: Any, bias: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Calls the attention function of the implementation; `bias` is (B or 1, H, Q, K) fp32 or `None`."""
        query, is_flex = inputs.query, self.implementation == "flex_attention"
        if is_flex and isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
            # it adds a mask that is a tensor to the scores, a boolean one too
            mask = hide(query.new_zeros(()), mask, query)
        if bias is not None and is_flex:  # indexes the bias by the row, also where all rows share one
            kwargs["position_bias"] = bias.expand(query.shape[0], -1, -1, -1)
        elif bias is not None:
            mask = merge_position_bias(bias, mask, query)
        if self.group.window is not None:  # flash attention makes its mask of it
            kwargs["sliding_window"] = self.group.window
        attend = partial(
            inputs.attention_interface,
            query,
            inputs.key,
            inputs.value,
            mask,
            dropout=layer.attention_dropout if layer.training else 0.0,
            **{**self.keywords, **kwargs},
        )
        # torch's choice of a kernel does not see through a transform whether the bias needs a gradient
        if self.implementation == "sdpa" and (is_differentiated_again() or (bias is not None and is_transformed())):
            with sdpa_kernel(SDPBackend.MATH):
                return attend()
        return attend()


@dataclass(kw_only=True)
class KeyBiasPlan(AttentionPlan):
    """Attention with a mask and a number per key, which the keys carry in extra dimensions."""

    @property
    def name(self) -> str:
        return f"{self.implementation}:key_bias"

    def attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = inputs.with_key_bias_in_extra_dims(self.key_mask, layer.scaling)
        return self._call(layer, inputs, self.mask, **kwargs)


@dataclass(kw_only=True)
class TablePlan(AttentionPlan):
    """Attention with a table of the distances, by the first kernel that supports it. Requires that the distance of
    any query to any key that it sees is that of their slots.

    Attributes:
        layer: an attention layer of the group.
        device, dtype: of queries.
        offset: the key slot of the first query.
        span: number of distances in the table.
        documents: (B or 1, K) document of each key, or `None`.
    """

    supports_key_bias: ClassVar[bool] = True
    needs_mask: ClassVar[bool] = False

    layer: nn.Module
    device: torch.device
    dtype: torch.dtype
    offset: int
    span: int
    documents: torch.Tensor | None = None

    @property
    def seen_mask(self) -> torch.Tensor | None:
        """(B, K) boolean, False on padding, or `None`, as the kernel takes it."""
        return self.key_mask

    @property
    def name(self) -> str:
        device_type = self.device.type
        is_autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if is_autocast else self.dtype
        query = torch.empty(0, 1, 64, 1, device=self.device, dtype=dtype)
        table = self._sum_tables(self.layer, self.schemes.table(64, self.device, self.group.schemes), 64)
        table = query.new_zeros(1, 64) if table is None else table
        call = TableCall(scaling=1.0, window=self.group.window)
        return f"distance_bias:{select_kernel(query, query, table, call).name}"

    def advance(self, keys: KeyPositions, num_slots: int) -> bool:
        return False

    def shared_bias(self) -> torch.Tensor | None:
        """→ (H, span) fp32 or `None`."""
        return self.schemes.table(self.span, self.device, self.group.schemes)

    def attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inputs = inputs.with_key_bias_in_extra_dims(self.key_mask, layer.scaling)
        return self._attend(layer, inputs, shared_bias, **kwargs)

    def _attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        table = self._table(layer, inputs, shared_bias)
        try:
            output = distance_bias_attention(
                inputs.query,
                inputs.key,
                inputs.value,
                table,
                scaling=layer.scaling,
                offset=self.offset,
                key_mask=self.seen_mask,
                documents=self.documents,
                window=self.group.window,
            )
        except NotFiniteError as error:
            given = self.span, self.device, self.group.schemes
            found = self.schemes.not_finite(*given) or layer.position_embeddings.not_finite(*given)
            raise NotFiniteError(found or str(error)) from error
        return output.transpose(1, 2), None

    def _table(self, layer: nn.Module, inputs: AttentionInputs, shared_table: torch.Tensor | None) -> torch.Tensor:
        """→ (H, span) fp32 (fp64 if the queries are), from distance 0 on, for the heads of this rank."""
        query, dtype = inputs.query, torch.promote_types(inputs.query.dtype, torch.float32)
        table = self._sum_tables(layer, shared_table, self.span)
        if table is None:  # the keys carry the whole bias
            return query.new_zeros(query.shape[1], self.span, dtype=dtype)
        return inputs.shard_heads(table).to(dtype)

    def _sum_tables(self, layer: nn.Module, shared_table: torch.Tensor | None, length: int) -> torch.Tensor | None:
        return add_biases((shared_table, layer.position_embeddings.table(length, self.device)))


@dataclass(kw_only=True)
class FlexTablePlan(TablePlan):
    """The same by FlexAttention, which reads the table for each score."""

    supports_key_bias: ClassVar[bool] = False
    needs_mask: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{self.implementation}:table"

    def _attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        query, key, value = inputs.query, inputs.key, inputs.value
        table = self._table(layer, inputs, shared_bias)
        output = flex_distance_attention(layer, query, key, value, table, self.mask, self.offset, layer.scaling)
        return output.transpose(1, 2), None


# implementation of transformers → how it reads a table of the distances
TABLE_PLANS: dict[str, type[TablePlan]] = {"sdpa": TablePlan, "flex_attention": FlexTablePlan}
