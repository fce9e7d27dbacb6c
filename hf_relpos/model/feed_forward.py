"""The MLP of the RelPos decoder. Shape letters: B batch, Q query length, C hidden size, I intermediate size."""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_relpos import RelPosConfig


class RelPosMLP(nn.Module):
    """C → I → C; with a gate, the activation of one matrix multiplies the other."""

    def __init__(self, config: RelPosConfig) -> None:
        super().__init__()
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = nn.Linear(width, inner, bias=bias) if config.use_gated_mlp else None
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, Q, C) → (B, Q, C)."""
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(hidden_states)))
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))
