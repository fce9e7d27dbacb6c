"""Bias schemes: a number for each head and distance d = query − key, added to the scaled scores."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .position_base import PositionEmbedding, SelfInitialized, register_position_embedding


class Float32Linear(SelfInitialized, nn.Module):
    """A linear layer that computes in fp32 whatever the dtype of its weights, initialised as `torch.nn.Linear` is.

    It is no `torch.nn.Linear`: tools that quantise or adapt every such layer would take the few weights of a bias for
    one, and put rounding or a low rank into the scores.
    """

    def __init__(self, fan_in: int, fan_out: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.empty(fan_out)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            init.uniform_(self.bias, -bound, bound)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.float(), None if self.bias is None else self.bias.float())


class ContinuousPositionBias(PositionEmbedding):
    """Continuous position bias (CPB): a small MLP maps the distance to one value per head. Each layer has its own.

    b[h, d] = MLP(features(d))[h], MLP: num_features → mlp_width → (mlp_width →) H with ReLU and biases, without one in
    the last layer: a constant for all distances cancels in the softmax and would only drift

    The MLP runs in fp32 on the distances, never on the (Q, K) matrix of pairs. Its weights keep the initialisation of
    `torch.nn.Linear`, U(±1/sqrt(fan_in)): from N(0, 0.02²) and zero biases half of the hidden units would never see a
    gradient, as distances have one sign only.

    Paper: Liu et al. 2022 (Swin Transformer V2), arXiv 2111.09883, section 3.3. Differs: one dimension, causal, one MLP
    per layer, a bias in the hidden layers, no sigmoid on the output.
    """

    kind = "relative"
    shared_across_layers = False
    defaults = {"mlp_width": 256}
    num_features = 1
    num_hidden = 1

    def __init__(self, config: Any, mlp_width: int = 256) -> None:
        super().__init__(config)
        widths = [self.num_features] + [mlp_width] * self.num_hidden + [config.num_attention_heads]
        self.mlp = nn.ModuleList(
            Float32Linear(fan_in, fan_out, bias=index < self.num_hidden)
            for index, (fan_in, fan_out) in enumerate(zip(widths, widths[1:]))
        )

    def features(self, distance: torch.Tensor) -> torch.Tensor:
        """(n,) integer distances → (n, num_features) fp32."""
        raise NotImplementedError

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        hidden = self.features(distance)
        for index, linear in enumerate(self.mlp):
            hidden = linear(F.relu(hidden) if index else hidden)
        return hidden.T


@register_position_embedding("linear_cpb")
class LinearCPB(ContinuousPositionBias):
    """Continuous position bias of the distance itself.

    b[h, d] = MLP(d)[h], MLP: 1 → 256 → H

    Parameters per layer: 512 + 256·H. Past the training length: the MLP is piecewise linear, so each head goes on in a
    straight line. Source: see `ContinuousPositionBias`.
    """

    extrapolates = "no limit; each head goes on in a straight line"

    def features(self, distance: torch.Tensor) -> torch.Tensor:
        return distance[:, None].float()


@register_position_embedding("linear_cpb_large")
class LinearCPBLarge(LinearCPB):
    """Continuous position bias of the distance, with one more hidden layer.

    b[h, d] = MLP(d)[h], MLP: 1 → 256 → 256 → H

    Parameters per layer: 66304 + 256·H. Past the training length: as `linear_cpb`.
    """

    num_hidden = 2


@register_position_embedding("log_cpb")
class LogCPB(ContinuousPositionBias):
    """Continuous position bias of the logarithm of the distance.

    b[h, d] = MLP(ln(1 + d))[h], MLP: 1 → 256 → H

    Parameters per layer: 512 + 256·H. Past the training length: each head goes on linearly in ln d.
    Source: see `ContinuousPositionBias`; the log spacing is that of the paper.
    """

    extrapolates = "no limit; each head goes on linearly in ln d"

    def features(self, distance: torch.Tensor) -> torch.Tensor:
        return torch.log1p(distance.float())[:, None]


@register_position_embedding("fourier_cpb")
class FourierCPB(ContinuousPositionBias):
    """Continuous position bias of sines and cosines of the distance.

    b[h, d] = MLP(sin(d·f_0), .., sin(d·f_7), cos(d·f_0), .., cos(d·f_7))[h], f_k = 20000^(−k/8), MLP: 16 → 256 → H

    Parameters per layer: 4352 + 256·H. Past the training length: bounded, with the low frequencies at unseen phases.
    Source: see `ContinuousPositionBias`; features as in arXiv 2006.10739.
    """

    extrapolates = "no limit; bounded, unseen phases"
    num_features = 16

    def features(self, distance: torch.Tensor) -> torch.Tensor:
        frequency = 20000.0 ** (-torch.arange(8, device=distance.device, dtype=torch.float32) / 8)
        angle = distance[:, None].float() * frequency
        return torch.cat((angle.sin(), angle.cos()), dim=-1)


@register_position_embedding("alibi")
class AlibiBias(PositionEmbedding):
    """Attention with linear biases (ALiBi).

    b[h, d] = −m_h · d; m_h = 2^(−8h/H), h = 1..H, if H is a power of two; else the slopes of n = 2^floor(log2 H) heads,
    followed by the first H − n of every other slope (1st, 3rd, ..) of 2n heads.

    Parameters: none. Past the training length: the same line; far keys fade.
    Paper: Press et al. 2022, arXiv 2108.12409; the slopes for other H as in its reference code.
    """

    kind = "relative"
    extrapolates = "no limit; far keys fade"

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        self.num_heads = config.num_attention_heads

    def slopes(self, device: torch.device | None = None) -> torch.Tensor:
        """→ (H,) fp32."""

        def geometric(num_heads: int) -> torch.Tensor:
            return torch.exp2(torch.arange(1, num_heads + 1, device=device, dtype=torch.float32) * (-8.0 / num_heads))

        power = 2 ** math.floor(math.log2(self.num_heads))
        return torch.cat((geometric(power), geometric(2 * power)[::2][: self.num_heads - power]))

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        return -self.slopes(distance.device)[:, None] * distance.float()
