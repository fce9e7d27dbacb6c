"""All position schemes by name: what a `pos_embedding_type` selects, and how several act together."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .scheme_absolute import SinusoidalEmbedding  # noqa: F401  (importing a family registers its schemes)
from .scheme_base import POSITION_EMBEDDINGS, PositionEmbedding, Positions
from .scheme_content import ForgetGate  # noqa: F401
from .scheme_distance_bias import AlibiBias  # noqa: F401
from .scheme_fire import FIRE  # noqa: F401
from .scheme_rotary import RotaryEmbedding  # noqa: F401


def list_position_embeddings() -> list[str]:
    """The names that `pos_embedding_type` accepts, alone, joined by '+' (`"sinusoidal+linear_cpb"`) to act together, or
    by '/' (`"rotary/rotary/rotary/none"`) to act in turn, layer after layer."""
    return list(POSITION_EMBEDDINGS)


def position_embedding_classes(pos_embedding_type: str) -> dict[str, type[PositionEmbedding]]:
    """`pos_embedding_type` → name → class of all its schemes, in the order written.

    Raises:
        ValueError: for an unknown name, a name twice, `none` in a combination, or a scheme that acts on the embeddings
            in some of the layers only.
    """
    allowed, text = list_position_embeddings(), pos_embedding_type
    parts = [part.split("+") for part in text.split("/")] if isinstance(text, str) else [[text]]
    if any(name not in allowed for names in parts for name in names):
        raise ValueError(
            f"`pos_embedding_type` must be one of {allowed}, several of them joined by '+', or these joined by '/' "
            f"for layers in turn, got {text!r}."
        )
    if any(len(set(names)) < len(names) or (len(names) > 1 and "none" in names) for names in parts):
        raise ValueError(f"`pos_embedding_type` must join different schemes other than 'none', got {text!r}.")
    classes = {name: POSITION_EMBEDDINGS[name] for names in parts for name in names}
    for name, cls in classes.items():
        if cls.embed is not PositionEmbedding.embed and any(name not in names for names in parts):
            raise ValueError(
                f"`pos_embedding_type` must name {name!r} between all '/' or nowhere, since it acts before the layers, "
                f"got {text!r}."
            )
    return classes


@dataclass(frozen=True)
class LayerKind:
    """What sets some of a model's layers apart from others.

    Attributes:
        schemes: the names of the schemes that act in them.
        window: how many keys, its own among them, a query sees at most; `None` for all.
    """

    schemes: tuple[str, ...]
    window: int | None

    @property
    def classes(self) -> list[type[PositionEmbedding]]:
        return [POSITION_EMBEDDINGS[name] for name in self.schemes]

    @property
    def has_bias(self) -> bool:
        """Whether any of the schemes adds a bias to the attention scores."""
        return any(cls.has_bias() for cls in self.classes)

    @property
    def has_table(self) -> bool:
        """Whether the schemes add a bias that is a function of the head and the distance alone."""
        others = any(cls.has_other_bias() or cls.has_score_bias() for cls in self.classes)
        return any(cls.has_distance_bias() for cls in self.classes) and not others

    @property
    def has_pair_bias(self) -> bool:
        """Whether the schemes add a bias that is more than a number per key."""
        return self.has_score_bias or any(cls.has_distance_bias() or cls.has_other_bias() for cls in self.classes)

    @property
    def has_score_bias(self) -> bool:
        """Whether the schemes add a bias that goes by the scores."""
        return any(cls.has_score_bias() for cls in self.classes)

    @property
    def has_key_state(self) -> bool:
        """Whether the schemes keep numbers beside the cached keys."""
        return any(cls.has_key_state() for cls in self.classes)

    @property
    def layer_type(self) -> str:
        """As transformers calls it."""
        return "full_attention" if self.window is None else "sliding_attention"


def layer_kinds(config: Any) -> list[LayerKind]:
    """The kind of each layer; its schemes are a part of `pos_embedding_type`, the first one again behind the last."""
    parts = [tuple(part.split("+")) for part in config.pos_embedding_type.split("/")]
    layer_types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    windows = [None if layer_type == "full_attention" else config.sliding_window for layer_type in layer_types]
    return [LayerKind(parts[index % len(parts)], window) for index, window in enumerate(windows)]


class PositionEmbeddings(nn.ModuleDict):
    """The schemes of one model or of one layer, acting as one: embeds and rotations chain, biases add."""

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, Q, C), (B or 1, Q) → (B, Q, C)."""
        for scheme in self.values():
            inputs_embeds = scheme.embed(inputs_embeds, positions)
        return inputs_embeds

    def rotations(self, positions: torch.Tensor, dtype: torch.dtype) -> dict[str, tuple]:
        """(B or 1, Q) → name → one of the `rotations` of `Positions`."""
        prepared = {name: (scheme.rotate, scheme.rotation(positions, dtype)) for name, scheme in self.items()}
        return {name: pair for name, pair in prepared.items() if pair[1] is not None}

    def bias(self, positions: Positions, names: Iterable[str] | None = None) -> torch.Tensor | None:
        """→ the sum of the biases of the schemes, or of some by name, (B or 1, H, Q, K) fp32, or `None`."""
        return add_biases(scheme.bias(positions) for scheme in self._named(names))

    def key_state(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(B, Q, C) → the sum of the schemes' key states, (B, H, Q) fp32, or `None`."""
        return add_biases(scheme.key_state(hidden_states) for scheme in self.values())

    def score_bias(
        self, scores: torch.Tensor, bias: torch.Tensor | None, query: torch.Tensor, positions: Positions
    ) -> torch.Tensor | None:
        """→ the sum of the schemes' biases by the scores, (B, H, Q, K) fp32, or `None`."""
        return add_biases(scheme.score_bias(scores, bias, query, positions) for scheme in self.values())

    def table(self, length: int, device: torch.device, names: Iterable[str] | None = None) -> torch.Tensor | None:
        """→ the sum of the distance tables of the schemes, or of some by name, (H, length) fp32, or `None`."""
        schemes = [scheme for scheme in self._named(names) if scheme.has_distance_bias()]
        return add_biases(scheme.table(length, device) for scheme in schemes)

    def _named(self, names: Iterable[str] | None) -> list[PositionEmbedding]:
        return [scheme for name, scheme in self.items() if names is None or name in names]


def add_biases(terms: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """→ the sum of those that are not `None`, or `None`."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def build_position_embeddings(config: Any, layer_idx: int | None = None) -> PositionEmbeddings:
    """The schemes of `config` that layers share, or those that a layer has of its own."""
    schemes = PositionEmbeddings()
    named = position_embedding_classes(config.pos_embedding_type) if layer_idx is None else None
    named = named or {name: POSITION_EMBEDDINGS[name] for name in layer_kinds(config)[layer_idx].schemes}
    for name, cls in named.items():
        if cls.shared_across_layers == (layer_idx is None):
            given = config.pos_embedding_kwargs or {}
            options = {option: given.get(option, value) for option, value in cls.defaults.items()}
            schemes[name] = cls(config, **options)
    return schemes
