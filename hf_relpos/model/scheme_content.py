"""Schemes that look at what the tokens hold: hidden states, queries and keys."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .scheme_base import PositionEmbedding, Positions, register_position_embedding
from .scheme_distance_bias import Float32Linear, KerpleLog


@register_position_embedding("fox")
class ForgetGate(PositionEmbedding):
    """Forgetting attention (FoX): each token says how much of what came before it is kept.

    b[h, i, j] = Σ ln f_k, k = j+1..i; f_k = sigmoid(w_h · x_k + β_h), x the input of the attention layer, normed

    In fp32, with f = 1 on padding and on cached keys that come from elsewhere, as a prefix of prefix tuning. It is the
    difference of two running sums, so that it takes a number per key and no (Q, K) matrix. Caches keep ln f beside the
    keys, and never quantise it.

    Parameters per layer: H·(C + 1), w from N(0, initializer_range²), β from 0, as in the reference code.
    Past the training length: content-dependent decay: tokens that the gates forgot stay forgotten, at any distance.
    Paper: Lin et al. 2025, arXiv 2503.02130, the plain variant without its output gate, norms and shifts.
    """

    kind = "relative"
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

    def key_bias(self, hidden_states: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden_states.device.type, enabled=False):
            gate = F.linear(hidden_states.float(), self.weight.float(), self.gate_bias.float())
            return F.logsigmoid(gate).transpose(1, 2)


@register_position_embedding("cope")
class ContextualPositions(PositionEmbedding):
    """Contextual position encoding (CoPE): a token counts the keys that it attends to. Experimental: slow.

    b[i, j] = q_i · e[p_ij]; p_ij = Σ sigmoid(s_ik), k = j..i, at most N − 1; s = q · k / sqrt(D), e interpolated
    linearly between whole numbers; N = max_position 64

    A sum over the keys that i sees, in each head. Several operations per score, a few queries at a time.

    Parameters per layer: N·D, the same for all heads, from 0. Past the training length: counts stop at N − 1.
    Paper: Golovneva et al. 2024, arXiv 2405.18719; the gates take scaled scores as in its code.
    """

    kind = "relative"
    shared_across_layers = False
    starts_at_zero = True
    defaults = {"max_position": 64}

    def __init__(self, config: Any, max_position: int = 64) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(max_position, config.head_dim))

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)

    def score_bias(
        self, scores: torch.Tensor, bias: torch.Tensor | None, query: torch.Tensor, positions: Positions
    ) -> torch.Tensor:
        gate = torch.where(positions.visible, scores.sigmoid(), 0.0)
        count = gate.flip(-1).cumsum(-1).flip(-1).clamp(max=len(self.weight) - 1)
        by_whole = query @ self.weight.float().T  # (B, H, Q, N)
        below, above = (by_whole.gather(-1, whole.long()) for whole in (count.floor(), count.ceil()))
        return below + (count - count.floor()) * (above - below)


@register_position_embedding("dape")
class DataAdaptiveBias(KerpleLog):
    """Data-adaptive positional encoding (DAPE) with KERPLE. Experimental: slow.

    b[h, i, j] = B[h, i − j] + MLP(s[1..H, i, j], B[1..H, i − j])[h], B as in `kerple_log`, s = q · k / sqrt(D);
    MLP: 2H → 32 → H with LeakyReLU; the width is the option `mlp_width`

    Beside other biases, B is the sum of all. Takes the MLP for each pair of tokens, a few queries at a time.

    Parameters per layer: 2·H of KERPLE, (3·H + 1)·32 of the MLP, which starts as `torch.nn.Linear`.
    Past the training length: B continues along the same curve; the MLP sees scores as in training.
    Paper: Zheng et al. 2024, arXiv 2405.14722. Differs: B is learned in each layer; no bias in the MLP's last layer,
    which would cancel in the softmax.
    """

    shared_across_layers = False
    defaults = {"mlp_width": 32}

    def __init__(self, config: Any, mlp_width: int = 32) -> None:
        super().__init__(config)
        self.hidden = Float32Linear(2 * config.num_attention_heads, mlp_width)
        self.out = Float32Linear(mlp_width, config.num_attention_heads, bias=False)

    def score_bias(
        self, scores: torch.Tensor, bias: torch.Tensor | None, query: torch.Tensor, positions: Positions
    ) -> torch.Tensor:
        pairs = torch.cat((scores, bias.expand_as(scores)), dim=1).permute(0, 2, 3, 1)
        return self.out(F.leaky_relu(self.hidden(pairs))).permute(0, 3, 1, 2)
