"""The norms and the dropout of the RelPos decoder. Shape letters: B batch, Q query length, C hidden size."""

import torch
import torch.nn.functional as F
from torch import nn

from .attention_native import native_library
from .configuration_relpos import RelPosConfig
from .functional_transforms import is_traced
from .fused_dropout import fused_dropout, has_dropout, is_plain_dropout
from .fused_norm import FusedNorm, has_norm, is_plain_training, rms_norm


class RelPosRMSNorm(nn.Module):
    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        weight, eps = self.weight, self.variance_epsilon
        if _is_plain_inference(hidden_states, weight):
            return F.rms_norm(hidden_states, weight.shape, weight, eps)
        if is_plain_training(hidden_states, weight) and has_norm(library := native_library()):
            return FusedNorm.apply(hidden_states, weight, eps, library)
        return rms_norm(hidden_states, weight, eps)


def _is_plain_inference(hidden_states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch computes the same numbers in one call: in fp32 on CPUs, where no gradient is taken."""
    if torch.is_grad_enabled():
        return False
    is_fp32_on_cpu = hidden_states.is_cpu and hidden_states.dtype == weight.dtype == torch.float32
    return is_fp32_on_cpu and not is_traced(hidden_states)


class RelPosDropout(nn.Dropout):
    """`nn.Dropout`, with another stream of random numbers where `fused_dropout` serves."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        acts = self.training and not self.inplace
        if acts and is_plain_dropout(input, self.p) and has_dropout(library := native_library()):
            return fused_dropout(input, self.p, library)
        return super().forward(input)


def drop(dropout: nn.Dropout, hidden_states: torch.Tensor) -> torch.Tensor:
    """What a dropout returns; outside of training without the call, which takes as long as a small operation."""
    is_called = dropout.training or dropout._forward_hooks or dropout._forward_pre_hooks
    return dropout(hidden_states) if is_called else hidden_states


def build_norm(config: RelPosConfig) -> nn.Module:
    """The norm of `config.norm_type` over the hidden size: (B, Q, C) → (B, Q, C)."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps, bias=config.norm_bias)
    return RelPosRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
