"""Absolute schemes: a vector for each position, added to the token embeddings."""

from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .functional_transforms import is_tracing
from .scheme_base import PositionEmbedding, register_position_embedding


@register_position_embedding("sinusoidal")
class SinusoidalEmbedding(PositionEmbedding):
    """Fixed sines and cosines.

    x_p ← x_p + PE(p), PE(p)[2k] = sin(p · 10000^(−2k/C)), PE(p)[2k+1] = cos(p · 10000^(−2k/C)), k = 0..C/2−1

    Parameters: none. Past the training length: defined for every position, untrained there.
    Paper: Vaswani et al. 2017, arXiv 1706.03762, section 3.5..
    """

    kind = "absolute"

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        if config.hidden_size % 2:
            raise ValueError(f"`hidden_size` must be even for sinusoidal positions, got {config.hidden_size}.")
        return options

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return inputs_embeds + self.sinusoids(positions, inputs_embeds.shape[-1]).to(inputs_embeds.dtype)

    @staticmethod
    def sinusoids(positions: torch.Tensor, hidden_size: int) -> torch.Tensor:
        """(B, Q) positions → (B, Q, C) fp32."""
        exponent = torch.arange(0, hidden_size, 2, device=positions.device, dtype=torch.float32) / hidden_size
        angle = positions[..., None].float() * 10000.0**-exponent
        return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


@register_position_embedding("scaled_sinusoidal")
class ScaledSinusoidalEmbedding(SinusoidalEmbedding):
    """Sines and cosines times one learned scalar.

    x_p ← x_p + s · PE(p), with PE as in `sinusoidal` and s learned from C^(−1/2)

    Parameters: 1. Past the training length: defined for every position, untrained there.
    Source: the fixed embedding of arXiv 1706.03762, scaled as in lucidrains/x-transformers.
    """

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        self.initial_scale = config.hidden_size**-0.5
        self.scale = nn.Parameter(torch.full((1,), self.initial_scale))

    def reset_parameters(self) -> None:
        init.constant_(self.scale, self.initial_scale)

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        sinusoids = self.sinusoids(positions, inputs_embeds.shape[-1]).to(inputs_embeds.dtype)
        return inputs_embeds + self.scale * sinusoids


@register_position_embedding("learned")
class LearnedEmbedding(PositionEmbedding):
    """A learned vector for each position.

    x_p ← x_p + W[p], W of shape (max_position_embeddings, C), initialised as the token embeddings

    Parameters: max_position_embeddings · C. Past the training length: `ValueError` from the end of the table on.
    Paper: Gehring et al. 2017, arXiv 1705.03122; used by GPT-2.
    """

    kind = "absolute"
    has_position_limit = True

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if not is_tracing(positions) and positions.numel():
            first, last = (int(bound) for bound in positions.aminmax())
            rows = self.embedding.num_embeddings
            if first < 0 or last >= rows:
                raise ValueError(
                    f"`max_position_embeddings`={rows}: a learned table has positions 0 to {rows - 1}, "
                    f"got {first if first < 0 else last}."
                )
        return inputs_embeds + self.embedding(positions)
