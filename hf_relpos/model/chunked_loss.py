"""The loss of next-token prediction, from hidden states and the output embedding, without the matrix of all logits.

Shape letters: T tokens, C hidden size, V vocabulary.
"""

import math
import zlib
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from .functional_transforms import differentiable_gradients, is_transformed, warn_of_memory


IGNORED = -100
# of transformers' loss, beside logits and labels
LOSS_KEYWORDS = ("num_items_in_batch", "shift_labels", "ignore_index")
# logits that exist at a time: 16 MiB in fp32
CHUNK_LOGITS = 2**22

_NAMESPACE = f"relpos_{zlib.crc32(__name__.encode()):08x}"


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    num_items_in_batch: int | torch.Tensor | None = None,
    shift_labels: torch.Tensor | None = None,
    ignore_index: int = IGNORED,
) -> torch.Tensor:
    """Mean cross-entropy of `hidden_states @ weight.T`, a few rows at a time.

    The gradients of a chunk are formed with its loss, so that its logits are never needed again: memory is that of the
    hidden states and the weight, and no matrix product is computed twice.

    Args:
        hidden_states: (B, N, C).
        weight: (V, C).
        labels: (B, N) token ids, `ignore_index` where there is no target; a token is its own label, shifted here.
        num_items_in_batch: what to divide the sum by, as the `Trainer` gives it; the number of targets by default.
        shift_labels: (B, N) labels that are shifted already, instead of `labels`.
        ignore_index: the label of what is no target.

    Returns:
        the loss in nats, fp32.

    Raises:
        ValueError: if there are more or fewer labels than hidden states.
    """
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.flatten().to(hidden_states.device)
    if targets.numel() != hidden_states[..., 0].numel():
        shape = tuple(hidden_states.shape[:2])
        raise ValueError(f"`labels` must be of shape {shape}, a label for each token, got {tuple(shift_labels.shape)}.")
    if ignore_index != IGNORED:
        targets = targets.masked_fill(targets == ignore_index, IGNORED)
    if is_transformed():
        total = _sum_at_once(hidden_states.flatten(0, 1), weight, targets)
    else:
        needed = [torch.is_grad_enabled() and factor.requires_grad for factor in (hidden_states, weight)]
        total, _, _ = _sum_losses(hidden_states.flatten(0, 1), weight, targets, *needed)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    elif isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


def _sum_at_once(hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(T, C), (V, C), (T,) → the sum of the losses, from all logits, in operations that torch can transform."""
    warn_of_memory("The loss", "the matrix of all logits")
    logits = (hidden_states @ weight.T).float()
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def cast_as_in_autocast(hidden_states: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """→ both in the dtype that a matrix product has here."""
    if torch.is_autocast_enabled(hidden_states.device.type):
        dtype = torch.get_autocast_dtype(hidden_states.device.type)
        return hidden_states.to(dtype), weight.to(dtype)
    return hidden_states, weight


@torch.library.custom_op(f"{_NAMESPACE}::linear_cross_entropy", mutates_args=())
def _sum_losses(
    hidden_states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, needs_hidden: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(T, C), (V, C), (T,) → the sum of the losses and its gradients, (T, C) and (V, C), empty where not needed."""
    is_target = (targets != IGNORED)[:, None]
    picked = targets[:, None].masked_fill(~is_target, 0)
    total = hidden_states.new_zeros((), dtype=torch.float32)
    grad_hidden = hidden_states.new_empty(hidden_states.shape if needs_hidden else 0)
    grad_weight = weight.new_zeros(weight.shape if needs_weight else 0, dtype=torch.float32)
    rows = min(max(CHUNK_LOGITS // len(weight), 1), len(targets))
    buffer = hidden_states.new_empty(rows, len(weight))
    for start in range(0, len(targets), rows):
        chunk = slice(start, min(start + rows, len(targets)))
        kept, hidden = is_target[chunk], hidden_states[chunk]
        # in units of ln 2: exp2 is several times as fast as exp on CPUs
        logits = buffer[: chunk.stop - start]
        logits = torch.addmm(logits, hidden, weight.T, beta=0, alpha=1 / math.log(2), out=logits).float()
        exponentials = logits.sub_(logits.amax(dim=-1, keepdim=True))
        total -= (exponentials.gather(1, picked[chunk]) * kept).sum() * math.log(2)
        sums = exponentials.exp2_().sum(dim=-1, keepdim=True)
        total += (sums.log() * kept).sum()
        if needs_hidden or needs_weight:
            # (softmax − one-hot) · sums, for rows with a target
            exponentials.scatter_add_(1, picked[chunk], -sums)
            grad_logits, scale = exponentials.to(weight.dtype), kept / sums
        if needs_hidden:
            grad_hidden[chunk] = (grad_logits @ weight) * scale
        if needs_weight and weight.dtype == torch.float32:
            grad_weight.addmm_(grad_logits.T, hidden * scale)
        elif needs_weight:
            grad_weight += grad_logits.T @ (hidden * scale).to(weight.dtype)
    return total, grad_hidden, grad_weight.to(weight.dtype)


@_sum_losses.register_fake
def _(hidden_states, weight, targets, needs_hidden, needs_weight):
    total = hidden_states.new_empty((), dtype=torch.float32)
    needed = ((hidden_states, needs_hidden), (weight, needs_weight))
    return total, *(factor.new_empty(factor.shape if is_needed else 0) for factor, is_needed in needed)


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple) -> None:
    hidden_states, weight, targets, *_ = inputs
    _, *gradients = output
    ctx.save_for_backward(hidden_states, weight, targets, *gradients)
    ctx.mark_non_differentiable(*gradients)


def _backward(ctx: Any, grad_total: torch.Tensor, *_: Any) -> tuple:
    hidden_states, weight, targets, grad_hidden, grad_weight = ctx.saved_tensors
    if torch.is_grad_enabled():  # `create_graph=True`
        function = partial(_sum_at_once, targets=targets)
        return *differentiable_gradients(function, (hidden_states, weight), grad_total), None, None, None
    gradients = (None if x.numel() == 0 else x * grad_total for x in (grad_hidden, grad_weight))
    return *gradients, None, None, None


_sum_losses.register_autograd(_backward, setup_context=_save_for_backward)
