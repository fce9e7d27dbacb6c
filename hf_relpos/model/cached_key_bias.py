"""Caches that keep a number per key beside the keys: what the `key_bias` of the schemes gave for the tokens so far.

The numbers lie in a cache layer of their own, inside the layer of the keys and of its kind: what a client does to a
cache is done to both, and keys and values look as those of any model. Keys that came without numbers, as the prefix of
prefix tuning does, have the number 0.

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


def add_with_key_bias(
    cache: Cache, key: torch.Tensor, value: torch.Tensor, key_bias: torch.Tensor, layer_idx: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keys, values and numbers per key of new tokens → those of all tokens so far.

    Args:
        cache: of any kind; its layer becomes one that keeps numbers.
        key, value: (B, G, Q, D).
        key_bias: (B, H, Q).
        layer_idx: the layer that they are of.

    Returns:
        (B, G, K, D) twice and (B, H, K).

    Raises:
        ValueError: for a cache whose layers are of a kind that is not known.
    """
    layers = cache.layers
    if cache.layer_class_to_replicate is not None:  # as in `Cache.update`
        while len(layers) <= layer_idx:
            layers.append(cache.layer_class_to_replicate())
    if not isinstance(layers[layer_idx], KeyBiasLayer):
        layers[layer_idx] = _convert(layers[layer_idx])
    kept = [key_bias]
    key, value = cache.update(key, value, layer_idx, key_bias=kept)
    return key, value, kept[0]


def _on_both(name: str) -> Callable:
    """→ a method that calls the one of this name of the keys' layer, then that of the numbers' layer."""

    def method(self: "KeyBiasLayer", *args: Any, **kwargs: Any) -> None:
        getattr(super(KeyBiasLayer, self), name)(*args, **kwargs)
        if self.key_bias_layer.is_initialized:
            getattr(self.key_bias_layer, name)(*args, **kwargs)

    method.__name__ = name
    return method


class KeyBiasLayer:
    """Before a class of cache layers: the same with a number per key and query head.

    Attributes:
        key_bias_layer: holds the numbers as its keys, (B, H, K, 1), and values of no channels.
    """

    key_bias_layer: CacheLayerMixin

    crop = _on_both("crop")
    reorder_cache = _on_both("reorder_cache")
    batch_repeat_interleave = _on_both("batch_repeat_interleave")
    batch_select_indices = _on_both("batch_select_indices")
    reset = _on_both("reset")
    offload = _on_both("offload")
    prefetch = _on_both("prefetch")

    def activate_past_recording(self) -> None:
        """As in transformers, which asks for it wherever a layer has the method."""
        for layer in (super(), self.key_bias_layer):
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        key_bias: list[torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in transformers.

        Args:
            key_bias: holds the numbers of the new tokens, (B, H, Q), and afterwards those of all, (B, H, K): a list,
                since the cache passes two tensors on and no third. By default the new numbers are 0.
        """
        numbers = self.key_bias_layer
        if key_bias is not None:
            new = key_bias[0].unsqueeze(-1)
            if not numbers.is_initialized:
                self._start(new)
            key_bias[0] = numbers.update(new, new[..., :0])[0].squeeze(-1)
        elif numbers.is_initialized:
            new = numbers.keys.new_zeros(*numbers.keys.shape[:2], key_states.shape[2], 1)
            numbers.update(new, new[..., :0])
        return super().update(key_states, value_states, *args, **kwargs)

    def _start(self, new: torch.Tensor) -> None:
        """Makes room for numbers as (B, H, Q, 1) `new`, beside the keys that are already here."""
        numbers = self.key_bias_layer
        if isinstance(self, StaticLayer):
            if self.is_initialized and torch.compiler.is_exporting():
                raise ValueError(
                    "`cache` of an export must come from a forward of the model where its schemes keep numbers beside "
                    "the keys, got one with room for keys alone."
                )
            numbers.lazy_initialization(new, new[..., :0])  # with zeros
            for name in ("cumulative_length", "cumulative_length_int"):
                count = getattr(self, name, None)
                if isinstance(count, torch.Tensor):
                    numbers.cumulative_length.copy_(count)
                elif count is not None:
                    setattr(numbers, name, count)
            return
        num_keys = self.get_mask_sizes(0)[0] if self.is_initialized else 0
        if not self.is_initialized or num_keys == 0:
            return
        if not is_tracing(new):
            logger.warning_once(
                "The cache holds keys without the numbers that schemes of this model keep beside them, as a prefix of "
                "prefix tuning: they count as 0, which adds nothing to the bias of earlier keys."
            )
        numbers.lazy_initialization(new, new[..., :0])
        numbers.keys = new.new_zeros(*new.shape[:2], num_keys, 1)
        numbers.values = numbers.keys[..., :0]
        if isinstance(numbers, DynamicSlidingWindowLayer):
            numbers.cumulative_length = self.cumulative_length


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
        f"numbers beside the keys, got {type(layer).__name__}."
    )


def _convert(layer: CacheLayerMixin) -> CacheLayerMixin:
    """→ the layer as one that keeps numbers. Another object, since compilers cannot trace a change of class."""
    numbers = _empty(layer, lambda cls: cls)
    if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and not layer.is_initialized:
        converted = _empty(layer, CLASSES.get)  # the one form that all supported compilers can trace
    else:
        converted = object.__new__(CLASSES.get(type(layer)) or _with_key_bias(type(layer)))
        for name, value in vars(layer).items():
            setattr(converted, name, value)
    converted.key_bias_layer = numbers
    return converted


def _with_key_bias(cls: type[CacheLayerMixin]) -> type[CacheLayerMixin]:
    """→ the subclass that keeps numbers; it has a name in this module, by which pickle and exporters find it again."""
    name = f"{cls.__name__}WithKeyBias"
    CLASSES[cls] = globals()[name] = type(name, (KeyBiasLayer, cls), {"__module__": __name__})
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
    _with_key_bias(_cls)
