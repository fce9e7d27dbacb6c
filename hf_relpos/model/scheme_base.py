"""The interface of a position scheme, and the registry that holds the schemes.

Shape letters: B batch, H heads, Q query length, K key length, D head size, C hidden size.
"""

import difflib
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .hook_results import wrong_result
from .kept_tables import name_scheme


logger = logging.get_logger(__name__)

POSITION_EMBEDDINGS: dict[str, type["PositionEmbedding"]] = {}

# methods of a scheme that act in a forward; any of them makes a model differ from one without positions
HOOKS = (
    "embed",
    "rotation",
    "rotate",
    "distance_bias",
    "max_table_position",
    "dense_bias",
    "key_bias",
    "score_bias",
)
# of these, what adds to the attention scores
BIAS_HOOKS = frozenset(("distance_bias", "dense_bias", "key_bias", "score_bias"))
# called once for all layers, or once in each layer: they are never called on the other kind of scheme
SHARED_HOOKS = frozenset(("embed", "rotation", "rotate"))
LAYER_HOOKS = frozenset(("max_table_position", "key_bias", "score_bias"))
# hooks that mean nothing without others
REQUIRED_HOOKS = {
    "rotation": ("rotate",),
    "rotate": ("rotation",),
    "max_table_position": ("distance_bias", "dense_bias"),
}
KINDS = ("none", "absolute", "relative")
# hooks that may be of either kind
HOOKS_OF_BOTH_KINDS = frozenset(("rotation", "rotate", "dense_bias", "score_bias"))
# hooks of version 0.1.0 → what they are called now
RENAMED_HOOKS = {"bias": "dense_bias", "key_state": "key_bias", "table_limit": "max_table_position"}


@dataclass(frozen=True)
class Positions:
    """Where the queries and the keys of some layers stand: integers counted over real tokens, never tensor indices.

    Layers with a sliding window may cache other keys than layers without one: an object is for layers that have the
    same keys.

    Attributes:
        query: (B or 1, Q) int64, the position of each query token.
        key: (B or 1, K) int64, the position of each cached or current key token.
        distance: (B or 1, Q, K) int64, query − key, 0 where the key is a later one (the causal mask hides it). The
            first dimension is 1 wherever all rows agree.
        visible: (B or 1, 1, Q, K) boolean, the keys that each query sees.
        first: (B or 1, Q or 1) int64, the position of the first token of each query's document, where a window may
            hide it; `None` where it is among the keys.
    """

    query: torch.Tensor
    key: torch.Tensor
    distance: torch.Tensor
    visible: torch.Tensor
    first: torch.Tensor | None = None

    @property
    def index(self) -> torch.Tensor:
        """(B or 1, Q) int64: the positions of the queries, counted from the first token of their document."""
        if self.first is not None:
            return self.query - self.first
        return torch.where(self.visible[:, 0], self.distance, 0).amax(-1)

    def take(self, queries: slice, keys: slice) -> "Positions":
        """Those of some queries and keys."""
        first = self.first if self.first is None or self.first.shape[1] == 1 else self.first[:, queries]
        pairs = (self.distance[:, queries, keys], self.visible[..., queries, keys])
        return Positions(self.query[:, queries], self.key[:, keys], *pairs, first)

    def to(self, device: torch.device | str | int, **kwargs: Any) -> "Positions":
        """The same on another device: accelerate moves what a module is given to where its parameters are."""
        given = {item.name: value for item in fields(self) if (value := getattr(self, item.name)) is not None}
        return replace(self, **{name: value.to(device, **kwargs) for name, value in given.items()})


class SelfInitialized:
    """Marks a module with parameters that `reset_parameters` initialises, instead of the rule for its class of layer.

    transformers skips modules without parameters of their own, so the mark belongs on the module that holds them.
    """


class HookCaller(nn.Module):
    """A module whose methods are called through it, by name: `scheme("distance_bias", distance)`.

    Whatever loads, gathers or moves the parameters of a module does it around its `forward`.
    """

    def forward(self, hook: str, *args: Any) -> Any:
        """→ what the method `hook` returns."""
        parts = _offloaded_parts(self)
        if not parts:
            return getattr(self, hook)(*args)
        with _loaded(parts):
            return getattr(self, hook)(*args)


def _offloaded_parts(module: nn.Module) -> list[nn.Module]:
    """→ the modules in it whose parameters accelerate loads around their `forward`."""
    parts = []
    for part in module._modules.values():
        if part is None:
            continue
        state = part.__dict__  # an attribute that is missing takes a module long to look for
        if "_hf_hook" in state:
            parts.append(part)
        if state["_modules"]:
            parts += _offloaded_parts(part)
    return parts


@contextmanager
def _loaded(parts: list[nn.Module]) -> Iterator[None]:
    """Keeps the parameters of modules loaded: a scheme may read those of a module that it holds and never calls."""
    forwards = [part.forward for part in parts]
    for part in parts:
        part._hf_hook.pre_forward(part)
        part.forward = part._old_forward  # a call would put them away again
    try:
        yield
    finally:
        for part, forward in zip(parts, forwards):
            part.forward = forward
            part._hf_hook.post_forward(part, None)


class StartGate(SelfInitialized, nn.Module):
    """A learned factor of what a scheme adds, from 0: laid over trained weights, it does nothing at first.

    Args:
        size: H for a scheme that adds to the scores, a factor for each head; 1 for one that adds to the embeddings.
    """

    hooks = frozenset(("embed", *BIAS_HOOKS))

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    @classmethod
    def fits(cls, scheme: type["PositionEmbedding"]) -> bool:
        """Whether it can gate a scheme: one that rotates, or that adds nothing at first anyway, it cannot."""
        return bool(scheme.hooks & cls.hooks) and not scheme.starts_at_zero

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)

    def forward(self, hook: str, value: torch.Tensor, args: tuple[Any, ...]) -> torch.Tensor:
        """What a hook returns, of (…, H, n), (…, H, Q, K) or (B, Q, C) → the same, times the factor."""
        if hook == "embed":
            return args[0] + self.weight.to(value.dtype) * (value - args[0])
        per_pair = hook in ("dense_bias", "score_bias")
        return value * self.weight.float().view(-1, *([1] * (2 if per_pair else 1)))


class PositionEmbedding(SelfInitialized, HookCaller):
    """Base class of all schemes. By default no hook changes anything, so that the base class itself is NoPE.

    A scheme overrides the hooks it needs and nothing else. Constants are computed from Python numbers in the hook that
    uses them and never stored as buffers: a buffer is cast by `model.to(dtype)` and left uninitialised by
    `from_pretrained`.

    The docstring of a scheme becomes the card of its models: a title, an equation after an empty line, and what follows
    `Parameters: `, `Past the training length: ` and `Paper: `.

    Class attributes:
        defaults: option name → default value; the only keys that `pos_embedding_kwargs` may hold for the scheme.
        shared_across_layers: one module for the whole model (True) or one per layer (False). `embed`, `rotation` and
            `rotate` are for shared schemes; `key_bias`, `score_bias` and `max_table_position` for those of a layer.
        has_position_limit: whether only `max_position_embeddings` positions are supported.
        starts_at_zero: whether it adds nothing with its initial parameters; a gate from 0 would keep it from learning.
        kind: "absolute" (depends on the positions themselves), "relative" (on distances alone) or "none". Without one,
            a scheme with `embed` is absolute, one with `distance_bias` or `key_bias` relative; others must say it.
        uses_rope_parameters: whether it reads `config.rope_parameters`.
        hooks: the names of the hooks that the class overrides; set when the class is created.

    Args:
        config: a `RelPosConfig`.
        **options: the scheme's `defaults`, overridden by `config.pos_embedding_kwargs`.

    Raises:
        TypeError: when a subclass is created, for hooks that nobody would call or that contradict each other.
        ValueError: when a model is built, for a scheme that `from_pretrained` would not bring back: one with buffers or
            other tensors in its attributes, or with parameters and no `reset_parameters`; in a forward, for a hook that
            returns another shape than its docstring says.
    """

    defaults: ClassVar[dict[str, Any]] = {}
    shared_across_layers: ClassVar[bool] = True
    has_position_limit: ClassVar[bool] = False
    starts_at_zero: ClassVar[bool] = False
    kind: ClassVar[str] = "none"
    uses_rope_parameters: ClassVar[bool] = False
    hooks: ClassVar[frozenset[str]] = frozenset()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.hooks = frozenset(name for name in HOOKS if getattr(cls, name) is not getattr(PositionEmbedding, name))
        _check_hooks(cls)

    def __init__(self, config: Any, **options: Any) -> None:
        super().__init__()
        self.start_gate: StartGate | None = None  # of those that `config.position_gates` names
        self.num_table_heads, self.table_name = config.num_attention_heads, name_scheme(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.table_name = name_scheme(self)  # a copy is another scheme

    def forward(self, hook: str, *args: Any) -> Any:
        """→ what the method `hook` returns, times the gate of the scheme if it has one."""
        value = super().forward(hook, *args)
        if (wrong := wrong_result(hook, value, args, self.num_table_heads)) is not None:
            raise ValueError(f"{scheme_title(self)}: {wrong}.")
        if self.start_gate is None or value is None or hook not in StartGate.hooks:
            return value
        return self.start_gate(hook, value, args)

    @classmethod
    def configure(cls, config: Any, options: dict[str, Any]) -> dict[str, Any]:
        """Checks the options that were given against `config` (raises `ValueError`); returns those to keep."""
        return options

    def reset_parameters(self) -> None:
        """Initialises the scheme's own parameters, through `transformers.initialization` only."""

    def embed(self, inputs_embeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(B, Q, C) token embeddings and (B or 1, Q) positions → (B, Q, C)."""
        return inputs_embeds

    def rotation(self, positions: torch.Tensor, dtype: torch.dtype) -> Any:
        """(B or 1, Q) positions → whatever `rotate` needs, computed once per forward; `None` for no rotation.

        What multiplies queries of (B, H, Q, D) needs a dimension for the heads, or a batch of H rows is taken for it:

            angle = positions[:, None, :, None].float() * frequencies  # (B or 1, 1, Q, D/2), not (B, Q, D/2)
            return angle.cos().to(dtype), angle.sin().to(dtype)
        """
        return None

    @staticmethod
    def rotate(query: torch.Tensor, key: torch.Tensor, rotation: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, H, Q, D) query and (B, G, Q, D) key of a layer, before the cache → the same shapes, or both with more
        channels. The rotation broadcasts against both: (B or 1, 1, Q, ..). Under tensor parallelism H and G are the
        heads of one rank, so that a rotation must not differ between heads there."""
        return query, key

    def distance_bias(self, distance: torch.Tensor) -> torch.Tensor | None:
        """(n,) integer distances → (H, n) fp32, what the attention adds to the scaled scores at each distance."""
        return None

    def max_table_position(self) -> torch.Tensor | None:
        """→ scalar tensor: the last position, counted from the first token, of a query whose whole bias is
        `distance_bias`; later queries get `dense_bias`. `None`: there is no such limit."""
        return None

    def dense_bias(self, positions: Positions) -> torch.Tensor | None:
        """→ (B or 1, H, Q, K) fp32 for all H heads (`expand` one that they share), added to the scaled scores: for a
        bias that does not depend on the distance alone. It is evaluated for every pair, unless `max_table_position`
        says up to which query `distance_bias` is the whole bias."""
        return None

    def key_bias(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """(B, Q, C) input of an attention layer → (B, H, Q) fp32, kept beside the cached keys: the bias between a query
        and a key is the sum over the tokens after the key, up to the query; 0 for cached keys from elsewhere."""
        return None

    def score_bias(
        self, scores: torch.Tensor, bias: torch.Tensor | None, query: torch.Tensor, positions: Positions
    ) -> torch.Tensor | None:
        """(B, H, Q, K) fp32 scaled scores, the sum of all other biases or `None`, (B, H, Q, D) query → a further bias,
        (B, H, Q, K) fp32. Takes O(Q · K) memory in every forward."""
        return None


def _check_hooks(cls: type[PositionEmbedding]) -> None:
    """Raises `TypeError` for a class whose hooks would not be called, or would differ between attention kernels."""

    def refuse(hook: str, reason: str) -> None:
        raise TypeError(f"position scheme {cls.__name__!r}: `{hook}` {reason}")

    if cls.forward is not PositionEmbedding.forward:
        refuse("forward", "is how the hooks of a scheme are called: give the method another name.")
    of_layer, shared = sorted(cls.hooks & LAYER_HOOKS), sorted(cls.hooks & SHARED_HOOKS)
    if of_layer and shared:
        refuse(of_layer[0], f"and `{shared[0]}` cannot be in one class: make two schemes and join them by '+'.")
    if of_layer and cls.shared_across_layers:
        refuse(of_layer[0], "is only called on schemes that each layer has: set `shared_across_layers = False`.")
    if shared and not cls.shared_across_layers:
        refuse(
            shared[0],
            "is only called on schemes that all layers share, not one for each: set `shared_across_layers = True`.",
        )
    for hook, others in REQUIRED_HOOKS.items():
        missing = [other for other in others if other not in cls.hooks]
        if hook in cls.hooks and missing:
            refuse(hook, f"does nothing without `{missing[0]}`: override both.")
    if {"distance_bias", "dense_bias"} <= cls.hooks and "max_table_position" not in cls.hooks:
        reason = "would be ignored beside `dense_bias`: `max_table_position` must say up to which query it is used."
        refuse("distance_bias", reason)
    if cls.kind not in KINDS:
        refuse("kind", f"must be one of {list(KINDS)}, got {cls.kind!r}.")
    public = [name for name in vars(PositionEmbedding) if not name.startswith("_")]
    for name, value in vars(cls).items():
        if callable(value) and name in RENAMED_HOOKS:
            refuse(name, f"is called `{RENAMED_HOOKS[name]}`: rename it.")
        near = difflib.get_close_matches(name, public, n=1, cutoff=0.85)
        if near and name not in public and not name.startswith("_"):
            refuse(name, f"is not part of a scheme; did you mean `{near[0]}`?")
    if cls.hooks and cls.kind == "none":
        if "embed" not in cls.hooks and cls.hooks & HOOKS_OF_BOTH_KINDS:
            reason = "must be 'relative' (it depends on distances alone) or 'absolute' (on the positions themselves)"
            refuse("kind", f"{reason}: `{sorted(cls.hooks & HOOKS_OF_BOTH_KINDS)[0]}` may be of either kind.")
        cls.kind = "absolute" if "embed" in cls.hooks else "relative"


def scheme_title(scheme: PositionEmbedding) -> str:
    """→ "position embedding 'alibi'", as errors name a scheme."""
    names = [name for name, cls in POSITION_EMBEDDINGS.items() if cls is type(scheme)]
    return f"position embedding {(names or [type(scheme).__name__])[0]!r}"


def register_position_embedding(name: str) -> Callable[[type[PositionEmbedding]], type[PositionEmbedding]]:
    """Class decorator: makes a scheme selectable as `pos_embedding_type=name`. A class that is defined again, as when a
    cell of a notebook is run twice, takes the place of the old one.

    Raises:
        ValueError: for a name that another class has, or that is empty or holds "+", "/" or white space.
        TypeError: for anything that is not a subclass of `PositionEmbedding`, or overrides no hook and so would act as
            `none`.
    """

    def register(cls: type[PositionEmbedding]) -> type[PositionEmbedding]:
        if not (isinstance(cls, type) and issubclass(cls, PositionEmbedding)):
            raise TypeError(f"position scheme {name!r} must be a subclass of PositionEmbedding, got {cls!r}.")
        if not isinstance(name, str) or re.fullmatch(r"[^\s+/]+", name) is None:
            raise ValueError(f"position embedding name must be a word without '+' and '/', got {name!r}.")
        if (before := POSITION_EMBEDDINGS.get(name)) is not None:
            if (before.__module__, before.__qualname__) != (cls.__module__, cls.__qualname__):
                raise ValueError(f"position embedding name {name!r} is taken by {before.__name__}: choose another.")
            logger.warning_once(f"Position embedding {name!r} is defined again: new models have the new class.")
        if not cls.hooks and POSITION_EMBEDDINGS:  # the first one is `none`
            raise TypeError(f"position scheme {name!r} would act as 'none': it must override one of {list(HOOKS)}.")
        POSITION_EMBEDDINGS[name] = cls
        return cls

    return register


@register_position_embedding("none")
class NoPositionEmbedding(PositionEmbedding):
    """No position embedding (NoPE): the causal mask alone tells positions apart.

    score[i, j] = q_i · k_j / sqrt(D)

    Parameters: none. Past the training length: no limit; attention spreads thinner over more keys.
    Paper: Kazemnejad et al. 2023, arXiv 2305.19466.
    """
