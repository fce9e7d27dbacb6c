"""The norms of the RelPos decoder. Shape letters: B batch, Q query length, C hidden size."""

import torch
from torch import nn

from .configuration_relpos import RelPosConfig


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


def build_norm(config: RelPosConfig) -> nn.Module:
    """The norm of `config.norm_type` over the hidden size: (B, Q, C) → (B, Q, C)."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)
    return RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
