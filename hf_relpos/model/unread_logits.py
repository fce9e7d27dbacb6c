"""Logits that are computed when something reads them, which a training step with labels need not do.

Shape letters: B batch, Q query length, C hidden size, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_map_only
from transformers.loss.loss_utils import ForCausalLMLoss

from .chunked_loss import LOSS_KEYWORDS, cast_as_in_autocast, linear_cross_entropy
from .functional_transforms import is_tracing, is_transformed
from .transformers_versions import CausalLMOutput, slice_logits_to_keep


_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)


class UnreadLogits(torch.Tensor):
    """(B, Q, V) logits of which only shape, dtype, device and place in the graph of gradients exist at first.

    The first operation computes them, from hidden states and a copy of the weight as it was, whatever has become of
    it since: an optimizer may have stepped, a sharded weight may be gone. A copy or a cast of what is unread is unread.
    What reads `logits` of an output by name, index or tuple gets a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, hidden_states: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> "UnreadLogits":
        shape = (*hidden_states.shape[:-1], len(weight))
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden_states.device)
        self.hidden_states, self.weight, self.computed = hidden_states, weight, None
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _COPIES and args[0].computed is None and _keeps_unread(kwargs):
            return cls(args[0].hidden_states, args[0].weight, kwargs.get("dtype") or args[0].dtype)
        args, kwargs = tree_map_only(cls, cls.compute, (args, kwargs))
        return func(*args, **kwargs)

    def compute(self) -> torch.Tensor:
        """→ the numbers, outside of the graph; the same tensor each time."""
        if self.computed is None:
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                self.computed = F.linear(self.hidden_states, self.weight).to(self.dtype)
        return self.computed

    def read(self) -> torch.Tensor:
        """→ a plain tensor in the place of this one in the graph."""
        with torch.inference_mode(False), torch.enable_grad():
            return _Read.apply(self)

    def tolist(self) -> list:
        return self.read().tolist()

    def __reduce_ex__(self, protocol: int) -> Any:
        return self.read().__reduce_ex__(protocol)

    def __repr__(self, **kwargs: Any) -> str:
        return f"UnreadLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={str(self.device)!r})"


def _keeps_unread(kwargs: dict[str, Any]) -> bool:
    given = {name: value for name, value in kwargs.items() if value is not None and name != "memory_format"}
    return not given or (given.keys() == {"dtype"} and given["dtype"].is_floating_point)


class _Defer(torch.autograd.Function):
    """(B, Q, C) hidden states and the (V, C) weight → their product, unread."""

    @staticmethod
    def forward(ctx: Any, hidden_states: torch.Tensor, weight: torch.Tensor) -> UnreadLogits:
        ctx.save_for_backward(hidden_states, weight)
        ctx.set_materialize_grads(False)
        return UnreadLogits(hidden_states.detach(), weight.detach().clone(), hidden_states.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        if grad is None:
            return None, None
        hidden_states, weight = ctx.saved_tensors
        grad_hidden = grad @ weight if ctx.needs_input_grad[0] else None
        grad_weight = grad.flatten(0, 1).T @ hidden_states.flatten(0, 1) if ctx.needs_input_grad[1] else None
        return grad_hidden, grad_weight


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: UnreadLogits) -> torch.Tensor:
        return logits.compute()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad


@dataclass
class UnreadOutput(CausalLMOutput):
    """As in transformers, with logits that are computed when they are read."""

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name == "logits" and type(value) is UnreadLogits:
            value = self.logits = value.read()
        return value

    def __getitem__(self, key: Any) -> Any:
        return self.logits if key == "logits" else super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        return self.logits if key == "logits" else super().get(key, default)


def output_class(logits: torch.Tensor | None) -> type[CausalLMOutput]:
    return UnreadOutput if type(logits) is UnreadLogits else CausalLMOutput


def loss_and_logits(
    model: Any,
    hidden_states: torch.Tensor,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    skip_logits: bool | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a forward of a `RelPosForCausalLM` returns first.

    Args:
        model: its head and its loss are used.
        hidden_states: (B, Q, C).
        labels, logits_to_keep, skip_logits, kwargs: as its `forward` got them.

    Returns:
        the loss, if there are labels, and the logits, unread or `None` where they are left out.
    """
    if labels is not None and skip_logits is not False and _has_plain_head(model, hidden_states):
        unread = not skip_logits and _may_stay_unread(model, hidden_states, logits_to_keep)
        if skip_logits or unread:
            given = {name: kwargs[name] for name in LOSS_KEYWORDS if kwargs.get(name) is not None}
            factors = cast_as_in_autocast(hidden_states, model.lm_head.weight)
            return linear_cross_entropy(*factors, labels, **given), _Defer.apply(*factors) if unread else None
    logits = model.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
    if labels is None:
        return None, logits
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **kwargs), logits


def _has_plain_head(model: Any, hidden_states: torch.Tensor) -> bool:
    """Whether the head is a plain matrix, here and whole, of no adapter, quantiser or hook, with the usual loss."""
    head = model.lm_head
    if type(head) is not torch.nn.Linear or head.bias is not None or model.loss_function is not ForCausalLMLoss:
        return False
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head) or torch_module._has_any_global_hook():
        return False
    whole = head.weight.shape == (model.config.vocab_size, hidden_states.shape[-1])
    plain = type(head.weight) in (torch.nn.Parameter, torch.Tensor)
    return plain and whole and head.weight.device == hidden_states.device


def _may_stay_unread(model: Any, hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> bool:
    """Whether this is a training step in which logits can be left until they are read."""
    if not model.training or is_tracing(hidden_states) or is_transformed() or not torch.is_grad_enabled():
        return False
    # FSDP reads all outputs; its first version leaves plain tensors in the place of parameters
    weight, names = model.lm_head.weight, {base.__name__ for base in type(model).__mro__}
    if "FSDPModule" in names or not isinstance(weight, torch.nn.Parameter):
        return False
    needs_gradient = hidden_states.requires_grad or weight.requires_grad
    return needs_gradient and isinstance(logits_to_keep, int) and logits_to_keep == 0
