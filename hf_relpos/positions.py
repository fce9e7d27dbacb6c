"""All position schemes by name: what a `pos_embedding_type` selects, and how several act together."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .position_absolute import SinusoidalEmbedding  # noqa: F401  (importing a family registers its schemes)
from .position_base import POSITION_EMBEDDINGS, PositionEmbedding, Positions
from .position_bias import AlibiBias  # noqa: F401
from .position_content import ForgetGate  # noqa: F401
from .position_fire import FIRE  # noqa: F401
from .position_rotary import RotaryEmbedding  # noqa: F401


def list_position_embeddings() -> list[str]:
    """The names that `pos_embedding_type` accepts, alone or joined by '+' (`"sinusoidal+linear_cpb"`)."""
    return list(POSITION_EMBEDDINGS)


def position_embedding_classes(pos_embedding_type: str) -> dict[str, type[PositionEmbedding]]:
    """`pos_embedding_type` → name → class, in the order written.

    Raises:
        ValueError: for an unknown name, a name twice, or `none` in a combination.
    """
    allowed = list_position_embeddings()
    names = pos_embedding_type.split("+") if isinstance(pos_embedding_type, str) else [pos_embedding_type]
    if any(name not in allowed for name in names):
        raise ValueError(
            f"`pos_embedding_type` must be one of {allowed} or several of them joined by '+', "
            f"got {pos_embedding_type!r}."
        )
    if len(set(names)) < len(names) or (len(names) > 1 and "none" in names):
        raise ValueError(
            f"`pos_embedding_type` must join different schemes other than 'none', got {pos_embedding_type!r}."
        )
    return {name: POSITION_EMBEDDINGS[name] for name in names}


class PositionEmbeddings(nn.ModuleDict):
    """The schemes of one model or of one layer, acting as one: embeds and rotations chain, biases add."""

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, Q, C), (B or 1, Q) → (B, Q, C)."""
        for scheme in self.values():
            inputs_embeds = scheme.embed(inputs_embeds, positions)
        return inputs_embeds

    def rotations(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple:
        """(B or 1, Q) → the `rotations` of `Positions`."""
        prepared = [(scheme.rotate, scheme.rotation(positions, dtype)) for scheme in self.values()]
        return tuple((rotate, rotation) for rotate, rotation in prepared if rotation is not None)

    def bias(self, positions: Positions) -> torch.Tensor | None:
        """→ the sum of the schemes' biases, (B or 1, H, Q, K) fp32, or `None`."""
        return add_biases(scheme.bias(positions) for scheme in self.values())

    def key_state(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(B, Q, C) → the sum of the schemes' key states, (B, H, Q) fp32, or `None`."""
        return add_biases(scheme.key_state(hidden_states) for scheme in self.values())

    def table(self, length: int, device: torch.device) -> torch.Tensor | None:
        """→ the sum of the schemes' distance tables, (H, length) fp32, or `None`."""
        return add_biases(scheme.table(length, device) for scheme in self.values() if scheme.has_distance_bias())


def add_biases(terms: Iterable[torch.Tensor | None]) -> torch.Tensor | None:
    """→ the sum of those that are not `None`, or `None`."""
    total = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def build_position_embeddings(config: Any, shared: bool) -> PositionEmbeddings:
    """The schemes of `config` that all layers share, or those that each layer has of its own."""
    schemes = PositionEmbeddings()
    for name, cls in position_embedding_classes(config.pos_embedding_type).items():
        if cls.shared_across_layers == shared:
            given = config.pos_embedding_kwargs or {}
            options = {option: given.get(option, value) for option, value in cls.defaults.items()}
            schemes[name] = cls(config, **options)
    return schemes
