"""Schemes that look at what the tokens hold: hidden states, queries and keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .position_base import PositionEmbedding, register_position_embedding


@register_position_embedding("fox")
class ForgetGate(PositionEmbedding):
    """Forgetting attention (FoX): each token says how much of what came before it is kept.

    b[h, i, j] = Σ ln f_k, k = j+1..i; f_k = sigmoid(w_h · x_k + β_h), x the input of the attention layer, normed

    In fp32, with f = 1 on padding. It is the difference of two running sums, so that it takes a number per key and no
    matrix of pairs. The keys carry ln f in the cache.

    Parameters per layer: H·(C + 1), w from N(0, initializer_range²), β from 0, as in the reference code.
    Past the training length: what the gates let fade stays away; distances as such play no role.
    Paper: Lin et al. 2025, arXiv 2503.02130, the plain variant without its output gate, norms and shifts.
    """

    kind = "relative"
    extrapolates = "no limit; far keys fade as the text says"
    shared_across_layers = False

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        self.initializer_range = config.initializer_range
        self.weight = nn.Parameter(torch.empty(config.num_attention_heads, config.hidden_size))
        self.gate_bias = nn.Parameter(torch.zeros(config.num_attention_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=self.initializer_range)
        init.zeros_(self.gate_bias)

    def key_state(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            gate = F.linear(hidden_states.float(), self.weight.float(), self.gate_bias.float())
            return F.logsigmoid(gate).transpose(1, 2)
