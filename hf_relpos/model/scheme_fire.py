"""FIRE: a bias by the distance in proportion to the query's position."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.utils.import_utils import is_tracing

from .scheme_base import PositionEmbedding, Positions, register_position_embedding
from .scheme_distance_bias import Float32Linear


@register_position_embedding("fire")
class FIRE(PositionEmbedding):
    """Functional interpolation of relative positions (FIRE): the distance, relative to the query's position.

    b[h, i, j] = MLP(ψ(i − j) / (ψ(max(i, T)) + 10⁻⁶))[h], ψ(x) = ln(|c|·x + 1), T = |m|·T0; MLP: 1 → 32 → H with ReLU

    i is the query's position, counted from the first token of its document; c is learned from 0.1, m from 1. T0 is the
    option `threshold`: by default the training length, 512 if the configuration does not say. Each layer has its own c,
    m and MLP. Up to position T the bias is a function of the distance alone, which the attention reads from a table;
    the queries behind it take a matrix of pairs.

    Parameters per layer: 66 + 32·H. Past the training length: the argument of the MLP stays in [0, 1].
    Paper: Li et al. 2023, arXiv 2310.04418. Differs: no bias in the MLP's last layer: it would cancel in the softmax.
    """

    kind = "relative"
    extrapolates = "no limit; distances are squeezed into the trained range"
    shared_across_layers = False
    defaults = {"threshold": 512}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        # kept, so that a later training length leaves it as it is
        return {"threshold": config.train_length or cls.defaults["threshold"], **options}

    def __init__(self, config: Any, threshold: int = 512) -> None:
        super().__init__(config)
        self.threshold = threshold
        self.scale, self.multiplier = nn.Parameter(torch.full((1,), 0.1)), nn.Parameter(torch.ones(1))
        self.hidden = Float32Linear(1, 32)
        self.out = Float32Linear(32, config.num_attention_heads, bias=False)

    def reset_parameters(self) -> None:
        init.constant_(self.scale, 0.1)
        init.ones_(self.multiplier)

    def table_limit(self) -> torch.Tensor:
        return self.multiplier.detach().float().abs()[0] * self.threshold

    def log(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log1p(self.scale.float().abs() * x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """(..,) → (.., H)."""
        return self.out(F.relu(self.hidden(x[..., None])))

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        reach = self.multiplier.float().abs() * self.threshold
        return self.mlp(self.log(distance.float()) / (self.log(reach) + 1e-6)).T

    def bias(self, positions: Positions) -> torch.Tensor:
        with torch.autocast(positions.query.device.type, enabled=False):
            index = torch.where(positions.visible[:, 0], positions.distance, 0).amax(-1, keepdim=True).float()
            limit = self.multiplier.float().abs() * self.threshold
            reach = torch.where(index > limit, index, limit)  # `maximum` would halve the gradient where they are equal
            x = self.log(positions.distance.float()) / (self.log(reach) + 1e-6)  # (B or 1, Q, K)
            # a few queries at a time: a pair has 32 hidden units; a graph is for any number of queries
            pieces = (x,) if is_tracing(x) else x.split(64, dim=1)
            pieces = [self.mlp(piece).permute(0, 3, 1, 2) for piece in pieces]
        return positions.local_heads(torch.cat(pieces, dim=2).transpose(0, 1)).transpose(0, 1)
