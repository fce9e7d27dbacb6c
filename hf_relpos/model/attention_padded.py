"""The plan of rows with padding in a compiled graph.

Shape letters: B batch, H query heads, G key and value heads, N tokens of a row, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention_plan import AttentionInputs, TablePlan


@dataclass(kw_only=True)
class RealFirstPlan(TablePlan):
    """A table where Python cannot look for the padding: the real tokens of each row are put before the others. In that
    order the distance of two is that of their positions, wherever padding stands between them.

    Attributes:
        places: (B, N), where each token stands in that order.
        is_before: (B, N) boolean, whether no real token stands before it or is it: it sees no key.
    """

    places: torch.Tensor
    is_before: torch.Tensor

    @staticmethod
    def sort(is_real: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, N) boolean → what this plan has beside the others."""
        counted = is_real.long().cumsum(-1)
        slots = torch.arange(1, is_real.shape[1] + 1, device=is_real.device)
        places = torch.where(is_real, counted, counted[:, -1:] + slots - counted) - 1
        return {"places": places, "is_before": counted == 0}

    @property
    def seen_mask(self) -> torch.Tensor:
        """(B, N), in that order."""
        return self.key_mask.scatter(1, self.places, self.key_mask)

    def _attend(
        self, layer: nn.Module, inputs: AttentionInputs, shared_bias: torch.Tensor | None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        slots = torch.arange(self.places.shape[1], device=self.places.device).expand_as(self.places)
        order = torch.zeros_like(self.places).scatter(1, self.places, slots)
        query, key, value = (_take(x, order, 2) for x in (inputs.query, inputs.key, inputs.value))
        inputs = inputs._replace(query=query, key=key, value=value)
        output, _ = super()._attend(layer, inputs, shared_bias, **kwargs)
        return _take(output, self.places, 1).masked_fill(self.is_before[:, :, None, None], 0.0), None


def _take(x: torch.Tensor, slots: torch.Tensor, dim: int) -> torch.Tensor:
    """(B, .., N, .., D), (B, N) → the same with the tokens, which are dimension `dim`, from these slots."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = slots.shape
    return x.gather(dim, slots.view(shape).expand(x.shape))
