"""Bias schemes: a number for each head and distance d = query − key, added to the scaled scores; and FIRE, whose number
also depends on the position of the query."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .functional_transforms import clamp, is_tracing
from .scheme_base import PositionEmbedding, Positions, SelfInitialized, register_position_embedding


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

    The MLP runs in fp32 on the distances, never on a (Q, K) matrix. Its weights keep the initialisation of
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

    Parameters per layer: 512 + 256·H. Past the training length: the MLP is piecewise linear, so each head continues
    in a straight line. Source: see `ContinuousPositionBias`.
    """

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

    Parameters per layer: 512 + 256·H. Past the training length: each head continues linearly in ln d.
    Source: see `ContinuousPositionBias`; the log spacing is that of the paper.
    """

    def features(self, distance: torch.Tensor) -> torch.Tensor:
        return torch.log1p(distance.float())[:, None]


@register_position_embedding("fourier_cpb")
class FourierCPB(ContinuousPositionBias):
    """Continuous position bias of sines and cosines of the distance.

    b[h, d] = MLP(sin(d·f_0), .., sin(d·f_7), cos(d·f_0), .., cos(d·f_7))[h], f_k = 20000^(−k/8), MLP: 16 → 256 → H

    Parameters per layer: 4352 + 256·H. Past the training length: bounded, with the low frequencies at unseen phases.
    Source: see `ContinuousPositionBias`; features as in arXiv 2006.10739.
    """

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


@register_position_embedding("t5")
class T5Bias(PositionEmbedding):
    """Relative position bias of T5: a learned number for each head and bucket of distances.

    b[h, d] = W[bucket(d), h]; bucket(d) = d for d < E, else E + floor((N − E) · ln(d/E) / ln(M/E)), at most N − 1;
    N = num_buckets 32, M = max_distance 128, E = N // 2

    The buckets' edges are found in integers: a logarithm in fp32 may fall on the wrong side of one.

    Parameters: N·H, one table for all layers, initialised from N(0, 0.02²). Past the training length: all keys from
    about M on share the last bucket; buckets that training did not reach keep their initial values.
    Paper: Raffel et al. 2020, arXiv 1910.10683, section 2.1. Differs: T5 leaves the scores unscaled and starts W at a
    standard deviation of C^(−1/2); the scores are scaled here, so W starts at 0.02.
    """

    kind = "relative"
    defaults = {"num_buckets": 32, "max_distance": 128}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        num_buckets, max_distance = ({**cls.defaults, **options}[name] for name in cls.defaults)
        if num_buckets < 2 or max_distance <= num_buckets // 2:
            raise ValueError(
                "`pos_embedding_kwargs` must have 'num_buckets' of at least 2 and 'max_distance' above half of it, "
                f"got {num_buckets} and {max_distance}."
            )
        return options

    def __init__(self, config: Any, num_buckets: int = 32, max_distance: int = 128) -> None:
        super().__init__(config)
        self.bucket_starts = _bucket_starts(num_buckets, max_distance)
        self.weight = nn.Parameter(torch.empty(num_buckets, config.num_attention_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.normal_(self.weight, std=0.02)

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        starts = torch.tensor(self.bucket_starts, device=distance.device)
        return self.weight.float()[torch.bucketize(distance, starts, right=True)].T


def _bucket_starts(num_buckets: int, max_distance: int) -> list[int]:
    """→ the first distance of each bucket but the first."""
    num_exact = num_buckets // 2
    num_wide = num_buckets - num_exact
    starts = list(range(1, num_exact + 1))
    for k in range(1, num_wide):
        # the smallest d with (d / E)^(N − E) ≥ (M / E)^k
        start = max(num_exact, int(num_exact * (max_distance / num_exact) ** (k / num_wide)) - 1)
        while start**num_wide * num_exact**k < max_distance**k * num_exact**num_wide:
            start += 1
        starts.append(start)
    return starts


class KerpleBias(PositionEmbedding):
    """Kernelised relative position embedding (KERPLE): a decay with two learned numbers per head.

    b[h, d] = −k(d; p_h, a_h), with p and a taken as 0.01 where they are less

    Paper: Chi et al. 2022, arXiv 2205.09921. Differs: its code overwrites p and a by the bounds in the forward pass;
    here the parameters stay as they are, and no gradient drives them further out.
    """

    kind = "relative"
    largest_p = math.inf

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        self.p = nn.Parameter(torch.empty(config.num_attention_heads))
        self.a = nn.Parameter(torch.empty(config.num_attention_heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init.uniform_(self.p, 0.0, 2.0)
        init.uniform_(self.a, 0.0, 1.0)

    def kernel(self, distance: torch.Tensor, p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """(n,) fp32 distances, (H, 1) parameters → (H, n)."""
        raise NotImplementedError

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        p = clamp(self.p.float(), 0.01, self.largest_p)
        a = clamp(self.a.float(), 0.01, math.inf)
        return -self.kernel(distance.float(), p[:, None], a[:, None])


@register_position_embedding("kerple_log")
class KerpleLog(KerpleBias):
    """KERPLE with the logarithmic kernel.

    b[h, d] = −p_h · ln(1 + a_h · d), with p and a taken as 0.01 where they are less

    Parameters: 2·H in all, p from U(0, 2) and a from U(0, 1). Past the training length: the same curve; far keys fade
    slowly. Source: see `KerpleBias`.
    """

    def kernel(self, distance: torch.Tensor, p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return p * torch.log1p(a * distance)


@register_position_embedding("kerple_power")
class KerplePower(KerpleBias):
    """KERPLE with the power kernel.

    b[h, d] = −a_h · d^(p_h), with p and a taken as 0.01 where they are less, and p as 2 where it is more

    Parameters: 2·H in all, p from U(0, 2) and a from U(0, 1). Past the training length: the same curve; far keys fade,
    with p > 1 faster than in ALiBi. Source: see `KerpleBias`.
    """

    largest_p = 2.0

    def kernel(self, distance: torch.Tensor, p: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        # the second derivative of 0^p in p would be NaN
        return a * distance.clamp(min=1) ** p * (distance > 0)


@register_position_embedding("sandwich")
class SandwichBias(PositionEmbedding):
    """Sandwich: the inner product of two sinusoidal position vectors, without their tokens.

    b[h, d] = H/(8h) · Σ_k (cos(d · 10000^(−2k/d̄)) − 1), k = 1..d̄/2, h = 1..H, d̄ = d_bar 128

    Parameters: none. Past the training length: the same curve, which falls as −ln d does up to some 10000 tokens.
    Paper: Chi et al. 2022, arXiv 2212.10356. Differs: the −1, which moves the curve to b[h, 0] = 0 and nothing else.
    """

    kind = "relative"
    defaults = {"d_bar": 128}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        if options.get("d_bar", 2) % 2:
            raise ValueError(f"`pos_embedding_kwargs` 'd_bar' must be even, got {options['d_bar']}.")
        return options

    def __init__(self, config: Any, d_bar: int = 128) -> None:
        super().__init__(config)
        self.num_heads, self.d_bar = config.num_attention_heads, d_bar

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        kwargs = {"device": distance.device, "dtype": torch.float32}
        frequency = 10000.0 ** (-2 / self.d_bar * torch.arange(1, self.d_bar // 2 + 1, **kwargs))
        product = ((distance[:, None].float() * frequency).cos() - 1).sum(-1)
        return self.num_heads / 8 / torch.arange(1, self.num_heads + 1, **kwargs)[:, None] * product


@register_position_embedding("fire")
class FIRE(PositionEmbedding):
    """Functional interpolation of relative positions (FIRE): the distance, relative to the query's position.

    b[h, i, j] = MLP(ψ(i − j) / (ψ(max(i, T)) + 10⁻⁶))[h], ψ(x) = ln(|c|·x + 1), T = |m|·T0; MLP: 1 → 32 → H with ReLU

    i is the query's position, counted from the first token of its document, also behind a window; c is learned from
    0.1, m from 1. T0 is the option `threshold`: by default the training length, 512 if the configuration does not say.
    Each layer has its own c, m and MLP. Up to position T the bias is a function of the distance alone, which the
    attention reads from a table; later queries take a dense (Q, K) bias.

    Parameters per layer: 66 + 32·H. Past the training length: the argument of the MLP stays in [0, 1].
    Paper: Li et al. 2023, arXiv 2310.04418. Differs: no bias in the MLP's last layer: it would cancel in the softmax.
    """

    kind = "relative"
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

    def max_table_position(self) -> torch.Tensor:
        return self.multiplier.detach().float().abs()[0] * self.threshold

    def log(self, x: torch.Tensor) -> torch.Tensor:
        return torch.log1p(self.scale.float().abs() * x)

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        """(..,) → (.., H)."""
        return self.out(F.relu(self.hidden(x[..., None])))

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor:
        reach = self.multiplier.float().abs() * self.threshold
        return self.mlp(self.log(distance.float()) / (self.log(reach) + 1e-6)).T

    def dense_bias(self, positions: Positions) -> torch.Tensor:
        with torch.autocast(positions.query.device.type, enabled=False):
            index = positions.index[..., None].float()
            limit = self.multiplier.float().abs() * self.threshold
            reach = torch.where(index > limit, index, limit)  # `maximum` would halve the gradient where they are equal
            x = self.log(positions.distance.float()) / (self.log(reach) + 1e-6)  # (B or 1, Q, K)
            # a few queries at a time: a pair has 32 hidden units; a graph is for any number of queries
            pieces = (x,) if is_tracing(x) else x.split(64, dim=1)
            pieces = [self.mlp(piece).permute(0, 3, 1, 2) for piece in pieces]
        return torch.cat(pieces, dim=2)
