"""What the steps of a generation share: the plans of their layers, tables of the bias and of rotations. It lives as
long as the cache of keys, and is made anew when anything that it was made of is another.

Shape letters: B batch, H query heads, Q query length, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import Cache

from .functional_transforms import is_tracing, is_transformed
from .kept_tables import SchemeState, Unkeepable
from .scheme_base import PositionEmbedding
from .scheme_registry import LayerGroup
from .token_positions import TokenPositions


# hooks of a scheme whose values steps share
TABLE_HOOKS = frozenset(("distance_bias", "max_table_position"))


def state_of_tables(model: nn.Module, num_layers: int) -> SchemeState | None:
    """→ the state of all schemes that have tables, and of the modules that they hang on; `None` if none has."""
    places, holders = [(model._modules, "position_embeddings")], [model.position_embeddings]
    for name, layer in islice(model.layers.named_children(), num_layers):
        attention = layer.self_attn
        places += [(model.layers._modules, name), (layer._modules, "self_attn")]
        places.append((attention._modules, "position_embeddings"))
        holders.append(attention.position_embeddings)
    places += [(holder._modules, name) for holder in holders for name in holder]
    schemes = [scheme for holder in holders for scheme in holder.values()]
    schemes = [scheme for scheme in schemes if scheme.rotates_alone or scheme.hooks & TABLE_HOOKS]
    return SchemeState(schemes, places) if schemes else None


@dataclass
class KeptSteps:
    """What the steps share that go by one cache.

    Attributes:
        model: the decoder.
        groups: that of each of its layers.
        facts: of the forward, what decides about plans and dtypes.
        state: of what the tables are computed from; `None` if there are none.
        tables: layer index → `RowPlan.kept`.
        plans: the first layer of each group and the plan of the last step, if that was without padding.
        rotations: scheme, dtype → its rotation of the positions from 0 on.
    """

    model: Callable[[], nn.Module | None]
    groups: list[LayerGroup]
    facts: tuple
    state: SchemeState | None
    tables: dict[int, torch.Tensor] = field(default_factory=dict)
    plans: list[tuple[int, Any]] = field(default_factory=list)
    rotations: dict[tuple[PositionEmbedding, torch.dtype], tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def rotation(
        self, tokens: TokenPositions, scheme: PositionEmbedding, dtype: torch.dtype
    ) -> tuple[torch.Tensor, ...] | None:
        """→ the rotation of the one position of a step, out of a table that is computed once for each power of two;
        `None` where the step has more positions, or one far behind all tokens, or the scheme no such table."""
        position = tokens.lone_position if scheme.rotates_alone else None
        if position is None or not 0 <= position <= 2 * tokens.past_length + 64:
            return None
        table = self.rotations.get((scheme, dtype))
        if table is None or position >= table[0].shape[2]:
            positions = torch.arange(max(64, 2 ** position.bit_length()), device=tokens.position_ids.device)
            table = self.rotations[scheme, dtype] = scheme("rotation", positions[None], dtype)
        return tuple(x.narrow(2, position, 1) for x in table)


# not an attribute of the cache, which others copy and flatten
_KEPT: WeakKeyDictionary[Cache, KeptSteps] = WeakKeyDictionary()


def kept_steps(
    model: nn.Module, groups: list[LayerGroup], tokens: TokenPositions, inputs_embeds: torch.Tensor
) -> KeptSteps | None:
    """→ what earlier steps left with the cache; `None` where nothing may be kept.

    Args:
        model: the decoder, with `config`, `layers` and `position_embeddings`.
        groups: that of each layer.
        tokens: where the tokens of the forward stand.
        inputs_embeds: (B, Q, C).
    """
    if tokens.cache is None or inputs_embeds.shape[1] != 1 or torch.is_grad_enabled():
        return None
    if is_transformed() or is_tracing(inputs_embeds):
        return None
    device, config = inputs_embeds.device, model.config
    is_autocast = torch.is_autocast_enabled(device.type)
    autocast_dtype = torch.get_autocast_dtype(device.type) if is_autocast else None
    facts = device, inputs_embeds.dtype, autocast_dtype, config._attn_implementation, model.training
    kept = _KEPT.get(tokens.cache)
    if kept is not None and kept.facts == facts and kept.groups == groups and kept.model() is model:
        if kept.state is None or kept.state.is_unchanged():
            return kept
    try:
        state = state_of_tables(model, len(groups))
    except Unkeepable:
        _KEPT.pop(tokens.cache, None)
        return None
    kept = _KEPT[tokens.cache] = KeptSteps(ref(model), groups, facts, state)
    return kept
