"""All position schemes by name: what a `pos_embedding_type` selects, and how several act together."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import ismethod
from operator import is_
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .functional_transforms import is_traced
from .kept_tables import kept_table
from .scheme_absolute import SinusoidalEmbedding  # noqa: F401  (importing a family registers its schemes)
from .scheme_base import (
    BIAS_HOOKS,
    POSITION_EMBEDDINGS,
    PositionEmbedding,
    Positions,
    SelfInitialized,
    StartGate,
    scheme_title,
)
from .scheme_content import ForgetGate  # noqa: F401
from .scheme_distance_bias import AlibiBias  # noqa: F401
from .scheme_names import scheme_hint
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
    unknown = [name for names in parts for name in names if name not in allowed]
    if unknown:
        raise ValueError(
            f"`pos_embedding_type` names no scheme: {unknown[0]!r}. {scheme_hint(unknown[0], allowed)} It must be one "
            f"of {allowed}, several of them joined by '+', or these joined by '/' for layers in turn, got {text!r}."
        )
    if any(len(set(names)) < len(names) or (len(names) > 1 and "none" in names) for names in parts):
        raise ValueError(f"`pos_embedding_type` must join different schemes other than 'none', got {text!r}.")
    classes = {name: POSITION_EMBEDDINGS[name] for names in parts for name in names}
    for name, cls in classes.items():
        if "embed" in cls.hooks and any(name not in names for names in parts):
            raise ValueError(
                f"`pos_embedding_type` must name {name!r} between all '/' or nowhere, since it acts before the layers, "
                f"got {text!r}."
            )
    return classes


@dataclass(frozen=True)
class LayerGroup:
    """What the layers of a group have in common, and no other layer has.

    Attributes:
        schemes: the names of the schemes that act in them.
        window: how many keys a query sees at most, its own among them; `None` for all.
        classes: of the schemes.
        hooks: those that any of the schemes overrides.
    """

    schemes: tuple[str, ...]
    window: int | None
    classes: tuple[type[PositionEmbedding], ...] = field(init=False, compare=False, repr=False)
    hooks: frozenset[str] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(POSITION_EMBEDDINGS[name] for name in self.schemes))
        object.__setattr__(self, "hooks", frozenset().union(*(cls.hooks for cls in self.classes)))

    @property
    def has_bias(self) -> bool:
        """Whether any of the schemes adds a bias to the attention scores."""
        return bool(self.hooks & BIAS_HOOKS)

    @property
    def has_key_bias(self) -> bool:
        """Whether the schemes keep numbers beside the cached keys."""
        return "key_bias" in self.hooks

    @property
    def has_score_bias(self) -> bool:
        """Whether the schemes add a bias that depends on the scores."""
        return "score_bias" in self.hooks

    @property
    def has_position_bias(self) -> bool:
        """Whether the schemes add a bias that depends on the positions of queries and keys."""
        return bool(self.hooks & {"distance_bias", "dense_bias"})

    @property
    def has_pair_bias(self) -> bool:
        """Whether the schemes add a bias that is more than numbers per key."""
        return bool(self.hooks & (BIAS_HOOKS - {"key_bias"}))

    @property
    def has_distance_table(self) -> bool:
        """Whether a table of the distances holds all that the schemes add, but for numbers per key."""
        is_dense = any({"dense_bias", "distance_bias"} & cls.hooks == {"dense_bias"} for cls in self.classes)
        return "distance_bias" in self.hooks and not (is_dense or self.has_score_bias)

    @property
    def has_table_of_layer(self) -> bool:
        """Whether each layer has a scheme of its own that is a function of the distance."""
        return any("distance_bias" in cls.hooks and not cls.shared_across_layers for cls in self.classes)

    @property
    def layer_type(self) -> str:
        """The name that transformers has for layers with and without a window."""
        return "full_attention" if self.window is None else "sliding_attention"


def layer_groups(config: Any) -> list[LayerGroup]:
    """The group of each layer; its schemes are a part of `pos_embedding_type`, whose parts repeat over the layers."""
    parts = [tuple(part.split("+")) for part in config.pos_embedding_type.split("/")]
    # all slide where there is a window, as the constructor chooses: it may be set later
    layer_types = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    if len(layer_types) < config.num_hidden_layers:
        raise ValueError(
            f"`layer_types` must have an entry for each of the `num_hidden_layers`={config.num_hidden_layers}, "
            f"got {len(layer_types)}."
        )
    windows = [None if layer_type == "full_attention" else config.sliding_window for layer_type in layer_types]
    return [LayerGroup(parts[index % len(parts)], window) for index, window in enumerate(windows)]


# a scheme's `rotate` and what it needs, computed once per forward
Rotation = tuple[Callable, Any]


class Rotates:
    """The rotations of a group of layers without the tensors in them, which a layer is given as such: they may come
    back moved, gathered or as a part of another graph.

    Attributes:
        factors: the tensors.
    """

    def __init__(self, rotations: list[Rotation]) -> None:
        self.rotations = rotations
        self.factors, self.structure = tree_flatten([needed for _, needed in rotations])

    def join(self, factors: Sequence[torch.Tensor]) -> list[Rotation]:
        """→ the rotations with these tensors in the place of `factors`."""
        is_traced = torch.compiler.is_compiling()
        if not is_traced and len(factors) == len(self.factors) and all(map(is_, factors, self.factors)):
            return self.rotations
        needed = tree_unflatten(list(factors), self.structure)
        return [(rotate, each) for (rotate, _), each in zip(self.rotations, needed)]


class PositionEmbeddings(nn.ModuleDict):
    """The schemes of one model or of one layer, acting as one: embeds and rotations chain, biases add."""

    @property
    def _no_split_modules(self) -> set[str]:
        """What transformers and accelerate must keep on one device: a map of devices may not end within a scheme, as
        it would between its own parameters and a module that it holds."""
        return {
            type(scheme).__name__ for scheme in self.values() if scheme._parameters and any(scheme.named_children())
        }

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, Q, C), (B or 1, Q) → (B, Q, C)."""
        for scheme in self._with("embed").values():
            inputs_embeds = scheme("embed", inputs_embeds, positions)
        return inputs_embeds

    def rotations(
        self,
        positions: torch.Tensor,
        dtype: torch.dtype,
        kept_rotation: Callable[[PositionEmbedding, torch.dtype], Any] | None = None,
        lengths: torch.Tensor | None = None,
    ) -> dict[str, Rotation]:
        """→ name of a scheme → its `rotate` and what that needs, for the schemes that transform q and k.

        Args:
            positions: (B or 1, Q).
            dtype: of queries and keys.
            kept_rotation: scheme, dtype → what it needs, where that is at hand, else `None`.
            lengths: (B or 1, Q), of the documents of packed rows that the tokens are of, or `None`.
        """
        rotations = {}
        for name, scheme in self._with("rotation").items():
            needed = kept_rotation(scheme, dtype) if kept_rotation is not None else None
            if needed is None:
                of_documents = () if lengths is None or not getattr(scheme, "follows_length", False) else (lengths,)
                needed = scheme("rotation", positions, dtype, *of_documents)
            if needed is not None:
                rotations[name] = _rotate(scheme), needed
        return rotations

    def key_bias(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(B, Q, C) → the sum of the schemes' key biases, (B, H, Q) fp32, or `None`."""
        return add_biases(scheme("key_bias", hidden_states) for scheme in self._with("key_bias").values())

    def score_bias(
        self, scores: torch.Tensor, bias: torch.Tensor | None, query: torch.Tensor, positions: Positions
    ) -> torch.Tensor | None:
        """→ the sum of the schemes' biases that depend on the scores, (B, H, Q, K) fp32, or `None`."""
        schemes = self._with("score_bias").values()
        return add_biases(scheme("score_bias", scores, bias, query, positions) for scheme in schemes)

    def table(self, length: int, device: torch.device, names: Iterable[str] | None = None) -> torch.Tensor | None:
        """→ the sum of the distance tables of the schemes, or of some by name, (H, length) fp32, or `None`."""
        schemes = self._with("distance_bias", names=names).values()
        return add_biases(distance_table(scheme, length, device) for scheme in schemes)

    def not_finite(self, length: int, device: torch.device, names: Iterable[str]) -> str | None:
        """→ which of the schemes has a distance table that is not finite, and where; `None` if none has."""
        for scheme in self._with("distance_bias", names=names).values():
            table = distance_table(scheme, length, device)
            wrong = (~table.isfinite()).nonzero().tolist()
            if wrong:
                head, distance = wrong[0]
                value = table[head, distance].item()
                return f"{scheme_title(scheme)}: `distance_bias` must be finite, got {value} at distance {distance}."
        return None

    def pair_tables(
        self,
        positions: Positions,
        length: int,
        shard_heads: Callable[[torch.Tensor], torch.Tensor] | None = None,
        names: Iterable[str] | None = None,
    ) -> dict[str, torch.Tensor]:
        """→ name of a scheme → (H, length) fp32, of the schemes whose bias a table of the distances holds.

        Args:
            positions: of queries and keys.
            length: exclusive upper bound of the distances.
            shard_heads: (H, ..) values of all heads → those of this rank.
            names: of the schemes, if not of all.
        """
        device, tables = positions.distance.device, {}
        # asking for the size would fix it in a program that is exported
        is_step = not is_traced(positions.distance) and positions.distance.shape[1] == 1
        for name, scheme in self._with("distance_bias", names=names).items():
            if "dense_bias" not in scheme.hooks:
                table = distance_table(scheme, length, device, is_step)
                tables[name] = table if shard_heads is None else shard_heads(table)
        return tables

    def dense_bias(
        self,
        positions: Positions,
        tables: dict[str, torch.Tensor],
        shard_heads: Callable[[torch.Tensor], torch.Tensor] | None = None,
        names: Iterable[str] | None = None,
    ) -> torch.Tensor | None:
        """→ the sum of the schemes' biases for every pair, (B or 1, H, Q, K) fp32, or `None`.

        Args:
            positions: of queries and keys.
            tables: what `pair_tables` returned for these schemes.
            shard_heads: (H, ..) values of all heads → those of this rank.
            names: of the schemes, if not of all.
        """
        terms = []
        for name, scheme in self._with("distance_bias", "dense_bias", names=names).items():
            if name in tables:
                terms.append(tables[name][:, positions.distance].movedim(0, 1))
            else:
                bias = scheme("dense_bias", positions)
                terms.append(bias if shard_heads is None else shard_heads(bias.transpose(0, 1)).transpose(0, 1))
        return add_biases(terms)

    def _with(self, *hooks: str, names: Iterable[str] | None = None) -> dict[str, PositionEmbedding]:
        """The schemes, or some by name, that have any of the hooks."""
        if not self._modules:  # a layer calls this more than once for each token
            return {}
        chosen = {name: scheme for name, scheme in self.items() if names is None or name in names}
        return {name: scheme for name, scheme in chosen.items() if not scheme.hooks.isdisjoint(hooks)}


def _rotate(scheme: PositionEmbedding) -> Callable:
    """Its `rotate`, which calls the module if it may read parameters."""
    return partial(scheme, "rotate") if ismethod(scheme.rotate) else scheme.rotate


def distance_table(scheme: PositionEmbedding, length: int, device: torch.device, is_step: bool = False) -> torch.Tensor:
    """→ (H, length) fp32: `distance_bias` on the distances 0..length−1, outside of autocast; in a step of a generation
    it may be kept."""
    kept = kept_table(scheme, length, device, is_step)
    if kept is not None:
        return kept
    with torch.autocast(device.type, enabled=False):
        return scheme("distance_bias", torch.arange(length, device=device))


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
    named = named or {name: POSITION_EMBEDDINGS[name] for name in layer_groups(config)[layer_idx].schemes}
    for name, cls in named.items():
        if cls.shared_across_layers == (layer_idx is None):
            given = config.pos_embedding_kwargs or {}
            options = {option: given[option] for option in cls.defaults if option in given}
            # the scheme may have been set after the configuration was made; a rotation that is there stays as it is
            if not (cls.uses_rope_parameters and getattr(config, "rope_parameters", None)):
                options = cls.configure(config, options)
                config.pos_embedding_kwargs = {**given, **options}
            schemes[name] = cls(config, **{**cls.defaults, **options})
            _check_parts(schemes[name])
            if name in (config.position_gates or ()):
                schemes[name].start_gate = StartGate(1 if "embed" in cls.hooks else config.num_attention_heads)
    return schemes


def _check_parts(scheme: PositionEmbedding) -> None:
    """Raises `ValueError` for a scheme that holds what `from_pretrained` does not bring back, or parameters that nobody
    initialises."""
    own = [f"`{name}`" for name in scheme._parameters]
    for prefix, part in scheme.named_modules():
        dot = f"{prefix}." if prefix else ""
        for what, names in (("buffer", part._buffers), ("tensor", held_tensors(part))):
            for name in names:
                raise ValueError(
                    f"{scheme_title(scheme)}: the {what} `{dot}{name}` would not come back from `from_pretrained`: "
                    "compute it from Python numbers in the hook that uses it, or make it a parameter."
                )
        # transformers initialises the layers of torch
        is_layer = type(part).__module__.startswith("torch.nn.") and "container" not in type(part).__module__
        if part is not scheme and part._parameters and not is_layer and not isinstance(part, SelfInitialized):
            own += [f"`{dot}{name}`" for name in part._parameters]
    if own and type(scheme).reset_parameters is PositionEmbedding.reset_parameters:
        raise ValueError(
            f"{scheme_title(scheme)}: `reset_parameters` must initialise the parameter {own[0]}, through "
            "`transformers.initialization` or `torch.nn.init`: override it."
        )


def held_tensors(part: nn.Module) -> list[str]:
    """The attributes of a module that are or hold tensors, other than its parameters, buffers and modules."""
    internal = vars(nn.Module()).keys()
    return [name for name, value in vars(part).items() if name not in internal and _holds_tensor(value)]


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        value = (*value.values(),)
    return isinstance(value, torch.Tensor) or (isinstance(value, (list, tuple, set)) and any(map(_holds_tensor, value)))
