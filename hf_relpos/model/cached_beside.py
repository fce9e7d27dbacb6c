"""Caches that keep more per token than a key and a value: the numbers that `key_bias` of the schemes gives, and the
channels that a scheme adds to the keys.

Each lies in a cache layer of its own, inside the layer of the keys and of its kind: what a client does to a cache is
done to all, and keys and values look as those of any model. Keys that came alone, as the prefix of prefix tuning does,
have zeros beside them.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    HQQQuantizedLayer,
    QuantoQuantizedLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import logging
from transformers.utils.import_utils import is_tracing


logger = logging.get_logger(__name__)


def add_with_beside(
    cache: Cache, key: torch.Tensor, value: torch.Tensor, beside: list[torch.Tensor], layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What new tokens bring → what all tokens so far brought.

    Args:
        cache: of any kind; its layer becomes one that keeps more than keys and values.
        key, value: (B, G, Q, D).
        beside: each (B, ·, Q, ·), as many for every forward.
        layer_idx: the layer that they are of.

    Returns:
        the same with K in the place of Q.

    Raises:
        ValueError: for a cache whose layers are of a kind that is not known.
    """
    layers = cache.layers
    if cache.layer_class_to_replicate is not None:  # as in `Cache.update`
        while len(layers) <= layer_idx:
            layers.append(cache.layer_class_to_replicate())
    if not isinstance(layers[layer_idx], LayerWithBeside):
        layers[layer_idx] = _convert(layers[layer_idx], len(beside))
    kept = list(beside)
    key, value = cache.update(key, value, layer_idx, beside=kept)
    return key, value, kept


def _on_all(name: str) -> Callable:
    """→ a method that calls the one of this name of the keys' layer, then those of the layers beside it."""

    def method(self: "LayerWithBeside", *args: Any, **kwargs: Any) -> None:
        getattr(super(LayerWithBeside, self), name)(*args, **kwargs)
        for layer in self.layers_beside:
            if layer.is_initialized:
                getattr(layer, name)(*args, **kwargs)

    method.__name__ = name
    return method


class LayerWithBeside:
    """Before a class of cache layers: the same with more per token than a key and a value.

    Attributes:
        layers_beside: each holds one more as its keys, (B, ·, K, ·), and values of no channels.
    """

    layers_beside: list[CacheLayerMixin]

    crop = _on_all("crop")
    reorder_cache = _on_all("reorder_cache")
    batch_repeat_interleave = _on_all("batch_repeat_interleave")
    batch_select_indices = _on_all("batch_select_indices")
    reset = _on_all("reset")
    offload = _on_all("offload")
    prefetch = _on_all("prefetch")

    def activate_past_recording(self) -> None:
        """As in transformers, which asks for it wherever a layer has the method."""
        for layer in (super(), *self.layers_beside):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        beside: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers.

        Args:
            beside: holds what the new tokens bring, each (B, ·, Q, ·), and afterwards what all did: a list that is
                changed, since the cache passes two tensors on and no third. By default they bring zeros.
        """
        for index, layer in enumerate(self.layers_beside):
            if beside is not None:
                new = beside[index]
                if not layer.is_initialized:
                    self._start(layer, new)
                beside[index] = layer.update(new, new[..., :0])[0]
            elif layer.is_initialized:
                old = layer.keys
                new = old.new_zeros(*old.shape[:2], key_states.shape[2], old.shape[3])
                layer.update(new, new[..., :0])
        return super().update(key_states, value_states, *args, **kwargs)

    def _start(self, layer: CacheLayerMixin, new: torch.Tensor) -> None:
        """Makes room in a layer beside, for what is as (B, ·, Q, ·) `new`, with zeros for the keys that are here."""
        if isinstance(self, StaticLayer):
            if self.is_initialized and torch.compiler.is_exporting():
                raise ValueError(
                    "`cache` of an export must come from a forward of the model where its schemes keep more than keys "
                    "and values, got one with room for keys and values alone."
                )
            layer.lazy_initialization(new, new[..., :0])  # with zeros
            for name in ("cumulative_length", "cumulative_length_int"):
                count = getattr(self, name, None)
                if isinstance(count, torch.Tensor):
                    layer.cumulative_length.copy_(count)
                elif count is not None:
                    setattr(layer, name, count)
            return
        num_keys = self.get_mask_sizes(0)[0] if self.is_initialized else 0
        if not self.is_initialized or num_keys == 0:
            return
        if not is_tracing(new):
            logger.warning_once(
                "The cache holds keys without what schemes of this model keep beside them, as in prefix tuning: it "
                "counts as 0, which for numbers per key adds nothing to the bias of earlier keys."
            )
        layer.lazy_initialization(new, new[..., :0])
        layer.keys = new.new_zeros(*new.shape[:2], num_keys, new.shape[3])
        layer.values = layer.keys[..., :0]
        if isinstance(layer, DynamicSlidingWindowLayer):
            layer.cumulative_length = self.cumulative_length


def _empty(layer: CacheLayerMixin, choose: Callable[[type], type]) -> CacheLayerMixin:
    """→ an empty layer of the same kind and size, of the class that is chosen for it; a quantised layer counts as
    dynamic.

    Raises:
        ValueError: for a layer of another kind.
    """
    if isinstance(layer, StaticSlidingWindowLayer):
        length = layer.max_cache_len  # of the window, where that is shorter than the cache
        return choose(StaticSlidingWindowLayer)(max_cache_len=length, sliding_window=length)
    if isinstance(layer, StaticLayer):
        return choose(StaticLayer)(max_cache_len=layer.max_cache_len)
    if isinstance(layer, DynamicSlidingWindowLayer):
        empty = choose(DynamicSlidingWindowLayer)(sliding_window=layer.sliding_window)
        empty.record_past = layer.record_past
        return empty
    if isinstance(layer, DynamicLayer):
        return choose(DynamicLayer)()
    raise ValueError(
        "`cache` must have layers of transformers' static, dynamic, sliding or quantised kinds where the schemes keep "
        f"more than keys and values, got {type(layer).__name__}."
    )


def _convert(layer: CacheLayerMixin, num_beside: int) -> CacheLayerMixin:
    """→ the layer as one that keeps more. Another object, since compilers cannot trace a change of class."""
    beside = [_empty(layer, lambda cls: cls) for _ in range(num_beside)]
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.is_initialized:
        converted = _empty(layer, CLASSES.get)  # the one form that all supported compilers can trace
    else:
        converted = object.__new__(CLASSES.get(type(layer)) or _with_beside(type(layer)))
        for name, value in vars(layer).items():
            setattr(converted, name, value)
    converted.layers_beside = beside
    return converted


def _with_beside(cls: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """→ the subclass that keeps more; it has a name in this module, by which pickle and exporters find it again."""
    name = f"{cls.__name__}WithBeside"
    CLASSES[cls] = globals()[name] = type(name, (LayerWithBeside, cls), {"__module__": __name__})
    return CLASSES[cls]


CLASSES: dict[type, type] = {}
for _cls in (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
    QuantoQuantizedLayer,
    HQQQuantizedLayer,
):
    _with_beside(_cls)
