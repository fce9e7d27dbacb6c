"""The plan of a cached step, whose one query needs a row of the bias and no more.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention_mask import hide, row_mask
from .attention_plan import AttentionInputs, TablePlan
from .key_positions import KeyPositions


@dataclass(kw_only=True)
class RowPlan(TablePlan):
    """One query: its row of the bias is a slice of the table, a mask for any kernel.

    Attributes:
        layers: the `layer_idx` of the layers of the group.
        last_position: the last position whose whole bias is in the table.
        kept: layer index → (1, H, 1, n) mask, the table from distance n − 1 down to 0, kept from step to step; `None`
            where nothing must be kept.
        last_slice: a mask and the row that was taken of it: layers may have one in common.
    """

    layers: Sequence[int]
    last_position: float
    kept: dict[int, torch.Tensor] | None = None
    last_slice: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def name(self) -> str:
        return f"{self.implementation}:row_bias"

    @property
    def num_seen(self) -> int:
        """The number of keys that the query sees, padding among them."""
        return min(self.offset + 1, self.group.window or self.offset + 1)

    def advance(self, keys: KeyPositions, num_slots: int) -> bool:
        if self.key_mask is not None or num_slots > self.last_position + 1:
            return False
        self.offset, self.last_slice = keys.offset, None
        return True

    def shared_bias(self) -> torch.Tensor | None:
        """→ (H, span) fp32 or `None`, where it is not needed too: all layers have their masks."""
        if self.kept is not None:
            masks = [self.kept.pop(layer, None) for layer in self.layers]
            if all(mask is not None and mask.shape[3] >= self.num_seen for mask in masks):
                self.kept.update(zip(self.layers, masks))
                return None
            # room for the steps to come, of which this may be a later one than the plan was made for
            span = max(64, 2 ** (self.num_seen - 1).bit_length())
            self.span = min(span, self.group.window or span)
        return super().shared_bias()

    def _attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen = slice(self.offset + 1 - self.num_seen, self.offset + 1)
        row = self._row(layer, inputs, shared_bias)
        if inputs.key.shape[2] != row.shape[3]:
            inputs = inputs._replace(key=inputs.key[:, :, seen], value=inputs.value[:, :, seen])
        if self.key_mask is not None:
            row = hide(row, self.key_mask[:, None, None, seen], inputs.query)
        return self._call(layer, inputs, row, **kwargs)

    def _row(self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None) -> torch.Tensor:
        """→ (1, H, 1, number of keys that are seen)."""
        mask = None if self.kept is None else self.kept.get(layer.layer_idx)
        if mask is None:
            mask = self._mask(layer, inputs, shared_bias)
        if self.last_slice is None or self.last_slice[0] is not mask:
            row = mask[..., mask.shape[3] - self.num_seen :]
            # kernels of GPUs want it aligned
            self.last_slice = mask, row.clone() if row.is_cuda else row
        return self.last_slice[1]

    def _mask(self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None) -> torch.Tensor:
        """→ (1, H, 1, span)."""
        kept, mask = {} if self.kept is None else self.kept, None
        if not self.group.has_table_of_layer:  # then that of another layer is the same
            others = (kept.get(other) for other in self.layers)
            mask = next((each for each in others if each is not None and each.device == inputs.query.device), None)
        if mask is None:
            # a kernel would copy one that does not lie head by head
            mask = row_mask(self._table(layer, inputs, shared_bias).flip(1), inputs.query).contiguous()
        kept[layer.layer_idx] = mask
        return mask
