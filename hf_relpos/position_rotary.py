"""Rotary schemes: q and k are rotated by an angle that grows with the position."""

from typing import Any

import torch

from .position_base import PositionEmbedding, register_position_embedding


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(..., D) → (..., D): the second half negated, in front of the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@register_position_embedding("rotary")
class RotaryEmbedding(PositionEmbedding):
    """Rotary position embedding (RoPE), whole or partial.

    The first R = D · partial_rotary_factor channels of q and k at position p are rotated pairwise, (k, k + R/2), by the
    angle p · θ_k, θ_k = rope_theta^(−2k/R), k = 0..R/2−1. The score then depends on i − j alone.

    Options live in `config.rope_parameters`, the field of transformers: `rope_theta` 10000 and `partial_rotary_factor`
    1.0 (the notebook that this project grew from used 0.5). `pos_embedding_kwargs` takes them too and moves them there.

    Parameters: none. Past the training length: defined for every position; unseen angles, perplexity rises steeply.
    Paper: Su et al. 2021, arXiv 2104.09864; the half-split layout is that of GPT-NeoX and Llama.
    """

    kind = "relative"
    extrapolates = "no limit; degrades steeply"
    defaults = {"partial_rotary_factor": 1.0, "rope_theta": 10000.0}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        parameters = {"rope_type": "default", **cls.defaults, **options, **(config.rope_parameters or {})}
        clash = [name for name in options if parameters[name] != options[name]]
        unknown = set(parameters) - set(cls.defaults) - {"rope_type"}
        if clash:
            raise ValueError(f"`pos_embedding_kwargs` and `rope_parameters` disagree about {clash}.")
        if unknown or parameters["rope_type"] != "default":
            raise ValueError(
                f"`rope_parameters` must be of rope_type 'default' with {sorted(cls.defaults)}, got {parameters}."
            )
        for name in cls.defaults:
            if not isinstance(parameters[name], (int, float)):
                raise ValueError(f"`rope_parameters` {name!r} must be a number, got {parameters[name]!r}.")
        factor, theta = parameters["partial_rotary_factor"], parameters["rope_theta"]
        if not 0 < factor <= 1 or int(config.head_dim * factor) < 2 or int(config.head_dim * factor) % 2:
            raise ValueError(
                f"`partial_rotary_factor` must lie in (0, 1] and leave an even number of a head's {config.head_dim} "
                f"channels, got {factor}."
            )
        if theta <= 0:
            raise ValueError(f"`rope_theta` must be positive, got {theta}.")
        config.rope_parameters = parameters
        return {}

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        self.rotary_dim = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
        self.rope_theta = config.rope_parameters["rope_theta"]

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """→ cos and sin, each (B or 1, 1, Q, R), computed in fp32."""
        exponent = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32) / self.rotary_dim
        angle = positions[:, None, :, None].float() * (1.0 / self.rope_theta**exponent)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        cos, sin = rotation
        dim = cos.shape[-1]

        def turn(x: torch.Tensor) -> torch.Tensor:
            rotary, rest = x[..., :dim], x[..., dim:]
            rotary = rotary * cos + rotate_half(rotary) * sin
            return torch.cat((rotary, rest), dim=-1) if rest.shape[-1] else rotary

        return turn(query), turn(key)
