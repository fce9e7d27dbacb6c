"""Schemes that transform q and k: rotations by an angle that grows with the position, a temperature of the query."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .functional_transforms import assert_async, clamp, is_tracing
from .scheme_base import POSITION_EMBEDDINGS, PositionEmbedding, register_position_embedding


# rope_type → the further keys of `rope_parameters`, those it needs first; as transformers names and reads them
ROPE_TYPES = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": (
        ("factor",),
        ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "truncate")
        + ("mscale", "mscale_all_dim"),
    ),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ("original_max_position_embeddings",)),
    "longrope": (
        ("short_factor", "long_factor"),
        ("factor", "attention_factor", "original_max_position_embeddings"),
    ),
    "proportional": ((), ("factor",)),
}


# their angles depend on the length of the sequence, which servers that lay requests end to end do not know
LENGTH_DEPENDENT_ROPE_TYPES = ("dynamic", "longrope")


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(..., D) → (..., D): the second half negated, in front of the first."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def rotate_channels(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, D), (B or 1, 1, Q, R) twice → (B, H, Q, D) with the first R channels rotated."""
    if cos.shape[-1] == x.shape[-1]:
        return x * cos + rotate_half(x) * sin
    rotary, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat((rotary * cos + rotate_half(rotary) * sin, rest), dim=-1)


@register_position_embedding("rotary")
class RotaryEmbedding(PositionEmbedding):
    """Rotary position embedding (RoPE), whole or partial, plain or scaled for a longer context.

    (x[k], x[k + R/2]) at position p, rotated by p · θ_k,  θ_k = rope_theta^(−2k/R),  k = 0..R/2−1

    x is q and k; of their D channels the first R = D · partial_rotary_factor take part. The score then depends on i − j
    alone.

    Options live in `config.rope_parameters`, the field of transformers: `rope_theta` 10000 and `partial_rotary_factor`
    1.0. `pos_embedding_kwargs` takes them too and moves them there. `rope_type` is one of `ROPE_TYPES`: the scalings of
    transformers, with its own functions for θ, so that a checkpoint means the same here and there.

    Differs (dynamic, longrope): the angles follow the length of the sequence, each document its own, so keys that were
    cached at a shorter length are wrong at a longer one. transformers uses them all the same; here it is an error.

    Parameters: none. Past the training length: defined for every position; unseen angles, perplexity rises steeply.
    Paper: Su et al. 2021, arXiv 2104.09864, the half-split layout is that of GPT-NeoX and Llama.
    Paper (linear): arXiv 2306.15595. Paper (yarn, dynamic): arXiv 2309.00071. Paper (longrope): arXiv 2402.13753.
    Paper (llama3): arXiv 2407.21783. Paper (proportional): arXiv 2410.06205.
    """

    kind = "relative"
    uses_rope_parameters = True
    defaults = {"partial_rotary_factor": 1.0, "rope_theta": 10000.0}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        saved = getattr(config, "rope_parameters", None) or {}
        parameters = {"rope_type": "default", **RotaryEmbedding.defaults, **options, **saved}
        clash = [name for name in options if parameters[name] != options[name]]
        if clash:
            raise ValueError(f"`pos_embedding_kwargs` and `rope_parameters` disagree about {clash}.")
        _check_keys(parameters)
        rotary_dim = _check_values(config, parameters)
        if "original_max_position_embeddings" in ROPE_TYPES[parameters["rope_type"]][1]:
            parameters.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        for name in ("short_factor", "long_factor"):
            if name in parameters and len(parameters[name]) != rotary_dim // 2:
                raise ValueError(
                    f"`rope_parameters` {name!r} must hold a number for each of the {rotary_dim // 2} angles, "
                    f"got {len(parameters[name])}."
                )
        config.rope_parameters = parameters
        return {}

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__(config)
        parameters = config.rope_parameters
        self.rope_type = parameters["rope_type"]
        self.rope_theta = parameters["rope_theta"]
        self.rotary_dim = int(config.head_dim * parameters.get("partial_rotary_factor", 1.0))
        self.factor = parameters.get("factor", 1.0)
        self.config = config
        self.attention_scaling, self.frequencies, self.long_frequencies = 1.0, None, None
        if self.rope_type not in ("default", "linear", "dynamic"):
            with torch.device("cpu"):  # a model is built on the meta device
                compute = ROPE_INIT_FUNCTIONS[self.rope_type]
                inv_freq, self.attention_scaling = compute(config, "cpu")
                self.frequencies = tuple(inv_freq.tolist())
                if self.rope_type == "longrope":
                    inv_freq, _ = compute(config, "cpu", seq_len=self._original_length() + 1)
                    self.long_frequencies = tuple(inv_freq.tolist())

    def inv_freq(self, positions: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        """(B or 1, Q) positions, and for packed rows (B or 1, Q) lengths of the tokens' documents → θ, fp32: (R/2,), or
        (B or 1, 1, 1 or Q, R/2) where it follows the length of the row or the document."""
        device = positions.device
        if self.rope_type in LENGTH_DEPENDENT_ROPE_TYPES:
            length = self._length(positions) if lengths is None else lengths[:, None, :, None]
        if self.frequencies is not None:
            theta = torch.tensor(self.frequencies, dtype=torch.float32, device=device)
            if self.long_frequencies is not None:
                long_theta = torch.tensor(self.long_frequencies, dtype=torch.float32, device=device)
                theta = torch.where(length > self._original_length(), long_theta, theta)
            return theta
        exponent = torch.arange(0, self.rotary_dim, 2, device=device, dtype=torch.float32) / self.rotary_dim
        if self.rope_type == "dynamic":
            original = self._original_length()
            stretch = self.factor * length.clamp(min=original) / original - (self.factor - 1)
            return 1.0 / (self.rope_theta * stretch ** (self.rotary_dim / (self.rotary_dim - 2))) ** exponent
        return 1.0 / self.rope_theta**exponent / self.factor

    @property
    def has_rotation_table(self) -> bool:
        """Whether `rotation` says of a position what it says of it among others, without parameters: cached steps read
        it from a table then. A subclass may have another `rotation`."""
        return type(self) is RotaryEmbedding and self.rope_type not in LENGTH_DEPENDENT_ROPE_TYPES

    @property
    def follows_length(self) -> bool:
        """Whether `rotation` takes the lengths of documents, on which its angles depend. A subclass of the user's may
        have another `rotation`."""
        return type(self).__module__ == __name__ and self.rope_type in LENGTH_DEPENDENT_ROPE_TYPES

    def _original_length(self) -> int:
        """The length from which on the angles change, where transformers has it."""
        if self.rope_type == "dynamic":
            return self.config.max_position_embeddings
        return self.config.rope_parameters["original_max_position_embeddings"]

    def _length(self, positions: torch.Tensor) -> torch.Tensor:
        """(B or 1, Q) → (B or 1, 1, 1, 1): the length of each row so far; refuses keys of other angles."""
        length, first, original = positions.amax(-1) + 1, positions.amin(-1), self._original_length()
        grown = (first > 0) & (length > original)  # a first position above 0: earlier keys are cached
        if self.rope_type == "longrope":
            grown &= first <= original
        if is_tracing(positions):
            assert_async(~grown.any(), f"rope_type {self.rope_type!r}: cached keys of a shorter length")
        elif bool(grown.any()):
            raise ValueError(
                f"`use_cache` must be False past {original} tokens with rope_type {self.rope_type!r}: its angles "
                "follow the length, and cached keys have those of a shorter one."
            )
        return length[:, None, None, None]

    def rotation(
        self, positions: torch.Tensor, dtype: torch.dtype, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """→ cos and sin, each (B or 1, 1, Q, R), computed in fp32."""
        angle = positions[:, None, :, None].float() * self.inv_freq(positions, lengths)
        angle = torch.cat((angle, angle), dim=-1)
        cos, sin = angle.cos() * self.attention_scaling, angle.sin() * self.attention_scaling
        return cos.to(dtype), sin.to(dtype)

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if query.shape[2] == 1:  # a cached step: so little that it is the number of operations that counts
            both = rotate_channels(torch.cat((query, key), dim=1), *rotation)
            return both.split((query.shape[1], key.shape[1]), dim=1)
        return rotate_channels(query, *rotation), rotate_channels(key, *rotation)


def _check_keys(parameters: dict[str, Any]) -> None:
    rope_type = parameters["rope_type"]
    if rope_type not in list(ROPE_TYPES):  # it may be of any type
        raise ValueError(f"`rope_parameters` 'rope_type' must be one of {list(ROPE_TYPES)}, got {rope_type!r}.")
    required, optional = ROPE_TYPES[rope_type]
    allowed = {"rope_type", *RotaryEmbedding.defaults, *required, *optional}
    unknown, missing = set(parameters) - allowed, [name for name in required if parameters.get(name) is None]
    if unknown or missing:
        raise ValueError(
            f"`rope_parameters` of rope_type {rope_type!r} must have {sorted(required)} and may have "
            f"{sorted(allowed - {*required})}, got {parameters}."
        )


def _check_values(config: Any, parameters: dict[str, Any]) -> int:
    """Returns R, the number of rotated channels that a frequency is needed for."""
    for name, value in parameters.items():
        if name == "rope_type" or (value is None and name not in RotaryEmbedding.defaults):
            continue
        values = value if name in ("short_factor", "long_factor") and isinstance(value, list) else [value]
        if name == "truncate":
            valid = isinstance(value, bool)
        else:
            valid = all(isinstance(x, (int, float)) and not isinstance(x, bool) and 0 < x < math.inf for x in values)
        if not valid:
            raise ValueError(f"`rope_parameters` {name!r} must be a positive number, got {value!r}.")
    if parameters.get("factor") is not None and parameters["factor"] < 1:
        raise ValueError(f"`rope_parameters` 'factor' must be at least 1, got {parameters['factor']}.")
    factor = parameters["partial_rotary_factor"]
    rotary_dim = int(config.head_dim * factor)
    smallest = 4 if parameters["rope_type"] == "dynamic" else 2  # its exponent is R / (R − 2)
    if not 0 < factor <= 1 or rotary_dim < smallest or rotary_dim % 2:
        raise ValueError(
            f"`partial_rotary_factor` must lie in (0, 1] and leave an even number, {smallest} or more, of a head's "
            f"{config.head_dim} channels, got {factor}."
        )
    return rotary_dim


@register_position_embedding("xpos")
class XPosEmbedding(RotaryEmbedding):
    """Extrapolatable position embedding (xPos): the rotation of `rotary` with a decay by the distance.

    score[i, j] = Σ_k ζ_k^((i − j)/s) · (part of the rotated score in channels k and k + R/2) / sqrt(D),
    ζ_k = (2k + 0.4R)/(1.4R), k = 0..R/2−1, s = scale_base 512; q_i is multiplied by ζ^((i − c)/s) and k_j by
    ζ^((c − j)/s), and c, `max_position_embeddings` / 2, cancels: it only keeps both factors near 1

    A cached key keeps its factor, so the factors grow with |p − c|: positions are served for which they stay below
    2^64 in fp32 and bf16, |p − c| ≤ 35.4·s = 18131, and below 2^8 in fp16, |p − c| ≤ 4.4·s = 2266: the square root of
    the dtype's range, the rest of which is for q, k and the gradients. Other positions are refused.

    Further options are those of `rotary`, in `config.rope_parameters`.

    Parameters: none. Past the training length: unseen angles in channels that have not faded; far keys fade by the
    channels of high frequency first.
    Paper: Sun et al. 2022, arXiv 2212.10554. Differs: c is fixed, where the reference takes the middle of the
    sequence, which cached keys would have to follow; the half-split layout of `rotary`.
    """

    defaults = {**RotaryEmbedding.defaults, "scale_base": 512}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        super().configure(config, {name: value for name, value in options.items() if name != "scale_base"})
        share = config.rope_parameters["partial_rotary_factor"]
        if config.rope_parameters["rope_type"] == "proportional" and share != 1:
            raise ValueError(
                "`partial_rotary_factor` must be 1 for rope_type 'proportional' with 'xpos', which has no decay for "
                f"channels that stand still among those that turn, got {share}."
            )
        return {name: value for name, value in options.items() if name == "scale_base"}

    def __init__(self, config: Any, scale_base: int = 512, **options: Any) -> None:
        super().__init__(config)
        self.scale_base = scale_base

    def rotation(
        self, positions: torch.Tensor, dtype: torch.dtype, lengths: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """→ cos and sin times the factor of the query, then those of the key, each (B or 1, 1, Q, R)."""
        centre = self._centre(positions, dtype)
        index = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32)
        zeta = (index + 0.4 * self.rotary_dim) / (1.4 * self.rotary_dim)
        factor = torch.cat((zeta, zeta)) ** ((positions - centre)[:, None, :, None].float() / self.scale_base)
        cos, sin = super().rotation(positions, torch.float32, lengths)
        return tuple(x.to(dtype) for x in (cos * factor, sin * factor, cos / factor, sin / factor))

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate_channels(query, *rotation[:2]), rotate_channels(key, *rotation[2:])

    def _centre(self, positions: torch.Tensor, dtype: torch.dtype) -> int:
        """→ c; refuses positions whose factors might overflow in the dtype of q and k."""

        def reach(dtype: torch.dtype) -> int:
            return int(math.log2(torch.finfo(dtype).max) / 2 / math.log2(3.5) * self.scale_base)  # ζ_0 = 1 / 3.5

        if torch.is_autocast_enabled(positions.device.type):
            dtype = torch.get_autocast_dtype(positions.device.type)
        centre = min(self.config.max_position_embeddings // 2, reach(torch.float32))
        first, last = centre - reach(dtype), centre + reach(dtype)
        outside = (positions < first) | (positions > last)
        message = f"`scale_base` {self.scale_base} lets xpos serve positions {max(first, 0)} to {last} in {dtype}"
        if is_tracing(positions):
            assert_async(~outside.any(), message)
        elif bool(outside.any()):
            raise ValueError(f"{message}, got {int(positions[outside].max())}.")
        return centre


@register_position_embedding("pope")
class PolarEmbedding(PositionEmbedding):
    """Polar coordinate position embedding (PoPE): magnitudes from the content alone, phases from the position alone.

    score[i, j] = Σ_c softplus(q_c) · softplus(k_c) · cos((j − i) · θ_c + δ_c) / sqrt(D), θ_c = rope_theta^(−c/D),
    c = 0..D−1; δ of each head and channel is learned from 0 and kept in [−2π, 0]

    It is computed as the product of vectors of 2D channels, so that keys take twice the room, half of it beside the
    keys of the cache, with zeros on keys that come from elsewhere, and attention has heads of 2D.

    Parameters: H·D, the same for all layers. Past the training length: reported to hold its loss far better than the
    rotation, without finetuning.
    Paper: Gopalakrishnan et al. 2025, arXiv 2509.10534. Differs: a phase that a step has carried out of the range
    learns on where that leads back.
    """

    kind = "relative"
    defaults = {"rope_theta": 10000.0}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        for part in config.pos_embedding_type.split("/"):
            names = part.split("+")
            others = [name for name in names if "rotate" in POSITION_EMBEDDINGS[name].hooks and name != "pope"]
            if "pope" in names and others:
                raise ValueError(
                    f"`pos_embedding_type` must not join 'pope' with {others[0]!r}, which changes q and k too, "
                    f"got {part!r}."
                )
        return options

    def __init__(self, config: Any, rope_theta: float = 10000.0) -> None:
        super().__init__(config)
        self.rope_theta, self.head_dim = rope_theta, config.head_dim
        self.phase = nn.Parameter(torch.zeros(config.num_attention_heads, config.head_dim))

    def reset_parameters(self) -> None:
        init.zeros_(self.phase)

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """→ cos and sin of the query, each (B or 1, H, Q, D), then those of the key, each (B or 1, 1, Q, D)."""
        channel = torch.arange(self.head_dim, device=positions.device, dtype=torch.float32)
        angle = positions[:, None, :, None].float() * self.rope_theta ** (-channel / self.head_dim)
        turned = angle - clamp(self.phase.float(), -2 * math.pi, 0.0)[:, None]
        return tuple(x.to(dtype) for x in (turned.cos(), turned.sin(), angle.cos(), angle.sin()))

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        heads = rotation[0].shape[1]
        if query.shape[1] != heads:
            raise ValueError(
                f"`tp_plan` must be None for pos_embedding_type 'pope', whose phases need all {heads} heads in one "
                f"place, got {query.shape[1]}."
            )
        return _polar(query, *rotation[:2]), _polar(key, *rotation[2:])


def _polar(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """(B, H, Q, D) contents and their phases → (B, H, Q, 2D)."""
    magnitude = F.softplus(x.float()).to(x.dtype)
    return torch.cat((magnitude * cos, magnitude * sin), dim=-1)


@register_position_embedding("temperature")
class Temperature(PositionEmbedding):
    """Attention temperature: the scores of queries past the training length are sharpened. Alone it is NoPE with that.

    q_i ← q_i · (1 + beta · ln(max(1, (i + 1)/L))), beta 0.1, L = `train_length`

    Parameters: none. Past the training length: what attention spreads over more keys, the temperature draws together
    again; up to it nothing changes.
    Paper: Wang et al. 2024, arXiv 2404.12224, for NoPE; the logarithm is that of arXiv 2512.12167. Differs: both scale
    all queries by the length of the sequence; here each goes by its own position, so that cached decoding gives what
    the whole forward gives.
    """

    kind = "absolute"
    defaults = {"beta": 0.1}

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        if config.train_length is None:
            raise ValueError("`train_length` must be set for pos_embedding_type 'temperature', got None.")
        return options

    def __init__(self, config: Any, beta: float = 0.1) -> None:
        super().__init__(config)
        self.config, self.beta = config, beta

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """→ (B or 1, 1, Q, 1), the factor of each query."""
        stretch = ((positions + 1).float() / self.config.train_length).clamp(min=1.0)
        return (1 + self.beta * stretch.log()).to(dtype)[:, None, :, None]

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return query * rotation, key
