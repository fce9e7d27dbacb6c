"""What the steps of a generation share: the plans of their layers, tables of the bias and of rotations. It lives as
long as the cache of keys, and is made anew when anything that it was made of is another.

Shape letters: B batch, H query heads, Q query length, D head size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn
from transformers import Cache

from .functional_transforms import is_tracing, is_transformed
from .scheme_base import PositionEmbedding
from .scheme_registry import LayerGroup
from .token_positions import TokenPositions


# hooks of a scheme whose values steps share
TABLE_HOOKS = frozenset(("distance_bias", "max_table_position"))


class Unkeepable(Exception):
    """A parameter whose numbers cannot be compared here: sharded, offloaded or of a kind of its own."""


class Sources:
    """The schemes of a model that have tables, with all that hangs on them, and its numbers at one time.

    A version counter would not do for these: what writes to `parameter.data`, as merging an adapter does, leaves it.

    Args:
        model: the decoder, with `layers` and `position_embeddings`.
        num_layers: how many of them are used.

    Raises:
        Unkeepable: for a parameter that is no plain tensor on a device.
    """

    def __init__(self, model: nn.Module, num_layers: int) -> None:
        # where each part hangs; a part that is another, as a parameter that was set anew, is found there
        self.places: list[tuple[dict[str, Any], str]] = [(model._modules, "position_embeddings")]
        self.dictionaries: list[dict[str, Any]] = []
        holders = [model.position_embeddings]
        for index, layer in enumerate(islice(model.layers, num_layers)):
            attention = layer.self_attn
            self.places += [(model.layers._modules, str(index)), (layer._modules, "self_attn")]
            self.places.append((attention._modules, "position_embeddings"))
            holders.append(attention.position_embeddings)
        for holder in holders:
            self.dictionaries.append(holder._modules)
            for name, scheme in holder.items():
                self.places.append((holder._modules, name))
                for part in scheme.modules() if scheme.hooks & TABLE_HOOKS else ():
                    self.dictionaries += (part._modules, part._parameters, part._buffers)
        held = [(each, name) for each in self.dictionaries for name in each]
        self.places += [place for place in held if place not in self.places]
        self.sizes = [*map(len, self.dictionaries)]
        self.parts = [each[name] for each, name in self.places]
        tensors = [part for part in self.parts if isinstance(part, torch.Tensor)]
        if any(type(x) not in (torch.Tensor, nn.Parameter) or x.is_meta for x in tensors):
            raise Unkeepable
        self.on_cpu = [(x, x.detach().clone()) for x in tensors if x.is_cpu]
        devices = {x.device for x in tensors if not x.is_cpu}
        self.elsewhere = [[x for x in tensors if x.device == device] for device in devices]
        self.numbers = [_flat(found) for found in self.elsewhere]

    def are_the_same(self) -> bool:
        """Whether all is as it was."""
        parts = [each.get(name) for each, name in self.places]
        if not all(map(is_, parts, self.parts)) or [*map(len, self.dictionaries)] != self.sizes:
            return False
        try:
            for x, numbers in self.on_cpu:
                if not torch.equal(x, numbers):
                    return False
            # one comparison for a device, which waits for it
            return all(torch.equal(_flat(found), numbers) for found, numbers in zip(self.elsewhere, self.numbers))
        except RuntimeError:  # of another dtype or on another device
            return False


def _flat(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.detach().flatten() for x in tensors])


@dataclass
class KeptSteps:
    """What the steps share that go by one cache.

    Attributes:
        model: the decoder.
        groups: that of each of its layers.
        facts: of the forward, what decides about plans and dtypes.
        sources: what the tables are computed from; `None` if there are none.
        tables: layer index → `RowPlan.kept`.
        plans: the first layer of each group and the plan of the last step, if that was without padding.
        rotations: scheme, dtype → its rotation of the positions from 0 on.
    """

    model: Callable[[], nn.Module | None]
    groups: list[LayerGroup]
    facts: tuple
    sources: Sources | None
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
        if kept.sources is None or kept.sources.are_the_same():
            return kept
    try:
        has_tables = any(group.hooks & TABLE_HOOKS for group in groups)
        sources = Sources(model, len(groups)) if has_tables else None
    except Unkeepable:
        _KEPT.pop(tokens.cache, None)
        return None
    kept = _KEPT[tokens.cache] = KeptSteps(ref(model), groups, facts, sources)
    return kept
