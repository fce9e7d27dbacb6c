"""The norms and the dropout of the RelPos decoder. Shape letters: B batch, Q query length, C hidden size."""

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_relpos import RelPosConfig
from .functional_transforms import is_traced


class RelPosRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if _is_plain_inference(hidden_states, self.weight):
            return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)
        normed = hidden_states.float()
        # a product with itself: the gradient of `pow` takes twice as long on CPUs
        normed = normed * torch.rsqrt((normed * normed).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * normed.to(hidden_states.dtype)


def _is_plain_inference(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch computes the same numbers in one call: in fp32 on CPUs, where no gradient is taken."""
    is_fp32_on_cpu = hidden_states.is_cpu and hidden_states.dtype == weight.dtype == torch.float32
    return is_fp32_on_cpu and not torch.is_grad_enabled() and not is_traced(hidden_states)


class RelPosDropout(nn.Dropout):
    """As in torch; outside of training, a call costs next to nothing."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states) if self.training else hidden_states


def build_norm(config: RelPosConfig) -> nn.Module:
    """The norm of `config.norm_type` over the hidden size: (B, Q, C) → (B, Q, C)."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)
    return RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
