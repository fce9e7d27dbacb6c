"""What differs between the versions of transformers that the family runs under, 5.17 to 5.24.

5.24 calls the keys and values of earlier tokens `cache`; before that they are `past_key_values`. Both names work here
under every version, in calls of a model and of `generate` and in what a model returns.
"""

import difflib
import functools
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import TransformersKwargs
from transformers.utils.import_utils import is_tracing


try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers < 5.19

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, kept]


NEW_NAME, OLD_NAME = CACHE_NAMES = ("cache", "past_key_values")
# the name that the installed transformers uses
CACHE_NAME = NEW_NAME if NEW_NAME in {item.name for item in fields(BaseModelOutputWithPast)} else OLD_NAME
# implementations whose functions come from here and from transformers
BUILT_IN_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
# keywords of `forward` that transformers defines for all models, beside its parameters
FORWARD_KEYWORDS = {*TransformersKwargs.__annotations__, *FlashAttentionKwargs.__annotations__, "return_dict"}
FORWARD_KEYWORDS |= {"shift_labels", "ignore_index"}  # of its loss
FORWARD_KEYWORDS |= {"cache_position"}  # of earlier versions, still given by some clients: the cache says it itself
FORWARD_PARAMETERS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "inputs_embeds",
    "labels",
    "use_cache",
    *CACHE_NAMES,
)
# what says where the sequences of a packed row begin, for some kernels only: positions say it for all
PACKING_KEYWORDS = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def takes_cache(function: Callable) -> Callable:
    """Decorator of a method: its argument for the keys and values of earlier tokens may be given by either name.

    The signature shows the name that the installed transformers looks for; where that is the new one, the old one
    warns. Raises `ValueError` if both are given.
    """
    signature = inspect.signature(function)
    name = next((name for name in CACHE_NAMES if name in signature.parameters), CACHE_NAME)
    (other,) = {*CACHE_NAMES} - {name}

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if other in kwargs:
            cache = kwargs.pop(other)
            if (
                CACHE_NAME == NEW_NAME != other and cache is not None and not is_tracing()
            ):  # as transformers does from 5.24 on
                warnings.warn(f"`{OLD_NAME}` is deprecated. Use `{NEW_NAME}` instead.", FutureWarning, stacklevel=2)
            if cache is not None and kwargs.get(name) is not None:
                raise ValueError("`cache` and `past_key_values` are two names of one argument, got both.")
            kwargs[name] = kwargs.get(name) if cache is None else cache
        return function(self, *args, **kwargs)

    parameters = [
        item.replace(name=CACHE_NAME) if item.name == name else item for item in signature.parameters.values()
    ]
    wrapped.__signature__ = signature.replace(parameters=parameters)
    return wrapped


if CACHE_NAME == NEW_NAME:
    ModelOutput, CausalLMOutput = BaseModelOutputWithPast, CausalLMOutputWithPast
else:

    class _CacheByNewName:
        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

        def __getitem__(self, key: Any) -> Any:
            return super().__getitem__(OLD_NAME if key == NEW_NAME else key)

    @dataclass
    class ModelOutput(_CacheByNewName, BaseModelOutputWithPast):
        """As in transformers, with `cache` as a second name of `past_key_values`."""

    @dataclass
    class CausalLMOutput(_CacheByNewName, CausalLMOutputWithPast):
        """As in transformers, with `cache` as a second name of `past_key_values`."""


def check_keywords(kwargs: dict[str, Any], position_ids: torch.Tensor | None, attn_implementation: str | None) -> None:
    """Refuses keyword arguments of `forward` that would be passed over in silence and change the result.

    Options that nobody here knows are left to attention functions that a user has registered or a server brings; so
    is all that is given to such functions.

    Raises:
        TypeError: for an unknown keyword that holds data or resembles a parameter, as Python does for a function
            without `**kwargs`.
        ValueError: for attention in both directions, and for packed rows without positions.
    """
    for name, value in kwargs.items():
        if name in FORWARD_KEYWORDS or value is None or attn_implementation not in BUILT_IN_ATTENTION:
            continue
        if isinstance(value, (torch.Tensor, Cache)) or difflib.get_close_matches(name, FORWARD_PARAMETERS, cutoff=0.8):
            raise TypeError(f"forward() got an unexpected keyword argument {name!r}")
    if kwargs.get("is_causal") is False:
        raise ValueError("`is_causal` must be True or None: these are causal language models, got False.")
    for name in PACKING_KEYWORDS:
        if position_ids is None and kwargs.get(name) is not None:
            raise ValueError(
                f"`position_ids` must be given with `{name}`: they start again with each sequence of a row."
            )
        if kwargs.get(name) is not None and attn_implementation in BUILT_IN_ATTENTION and not is_tracing():
            _check_packing(name, kwargs[name], position_ids)


def _check_packing(name: str, packing: torch.Tensor, position_ids: torch.Tensor) -> None:
    """Raises `ValueError` unless the sequences of packed rows begin where their positions start again."""
    starts = position_ids.diff(dim=-1, prepend=position_ids[:, :1]) <= 0
    if name == "seq_idx":
        given = packing.diff(dim=-1, prepend=packing[:, :1] - 1) != 0
        fits = given.shape[-1] == starts.shape[-1] and bool((given == starts).all())
    else:  # the bounds of all rows, laid end to end
        num_rows, rest = divmod(int(packing[-1]), starts.shape[-1])
        fits = not rest and len(starts) in (1, num_rows)
        fits = fits and {*packing[:-1].tolist()} == {*starts.expand(num_rows, -1).flatten().nonzero()[:, 0].tolist()}
    if not fits:
        raise ValueError(f"`{name}` must agree with `position_ids`, which start again with each sequence of a row.")


def add_to_cache(
    cache: Any, key: torch.Tensor, value: torch.Tensor, layer_idx: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of new tokens → those of all tokens so far, each (B, G, K, D).

    Args:
        cache: a `Cache`, or the paged cache of continuous batching, which changes `kwargs` on its way to the attention.
        key, value: (B, G, Q, D).
        layer_idx: the layer that they are of.
        kwargs: keyword arguments of the attention function.
    """
    if isinstance(cache, Cache):
        return cache.update(key, value, layer_idx)
    if CACHE_NAME == NEW_NAME:
        return cache.update(key, value, layer_idx, kwargs=kwargs)
    kwargs[NEW_NAME] = cache  # the paged attention of these versions adds to it
    return key, value
