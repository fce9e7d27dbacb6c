"""Evaluation of any causal language model of transformers: loss by length and by position, over the same target tokens.

Shape letters: B batch, N tokens of a block, V vocabulary. Losses are in nats.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..messages import Progress
from ..results.result_file import SLIDING
from .loss_sums import RunningLoss
from .window_losses import WindowLosses


LOSSES_AT_A_TIME = 2048
LONG = 120  # seconds from which a shorter evaluation is offered


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Dropout off and no gradients; the mode that the model was in is restored."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def token_losses(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The loss of each token given those before it in its row.

    Args:
        model: a causal language model.
        tokens: (B, N) token ids.

    Returns:
        (B, N) fp32 on the CPU; the first column is NaN: nothing comes before it.

    Raises:
        ValueError: if the model does not support N positions, or gives a loss that is not finite.
    """
    tokens = tokens.to(model.device)
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    except IndexError as error:
        raise ValueError(f"the model does not support a length of {tokens.shape[1]} tokens: {error}") from error
    losses = torch.full(tokens.shape, math.nan, dtype=torch.float32)
    # a few logits at a time: an fp32 copy of all, or their softmax, would be the peak of memory
    for row in range(len(tokens)):
        for start in range(0, tokens.shape[1] - 1, LOSSES_AT_A_TIME):
            targets = tokens[row, start + 1 : start + 1 + LOSSES_AT_A_TIME]
            scores = logits[row, start : start + len(targets)].float()
            losses[row, start + 1 : start + 1 + len(targets)] = F.cross_entropy(scores, targets, reduction="none").cpu()
    if not losses[:, 1:].isfinite().all():
        raise ValueError(f"the model's loss is not finite at a length of {tokens.shape[1]} tokens.")
    return losses


def document_windows(documents: Iterable[Sequence[int]], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """→ number of the document and (length,) tokens, for each whole window, one after the other.

    Where `documents` has `numbers`, its rows with one number are pieces of one document.
    """
    numbers = getattr(documents, "numbers", None)
    for index, document in enumerate(documents):
        index = index if numbers is None else numbers[index]
        document = np.asarray(document, dtype=np.int64)
        for start in range(0, len(document) - length + 1, length):
            yield index, document[start : start + length]


def evaluate_lengths(
    model: Any,
    documents: Iterable[Sequence[int]],
    lengths: Sequence[int],
    train_length: int | None = None,
    tokens_per_batch: int = 16384,
    max_windows: int | None = None,
    sliding_baseline: bool = False,
) -> dict[str, Any]:
    """Loss by length and by position.

    The text is cut into windows of the longest length within documents. At each length L a window is read in blocks of
    L tokens from its start. A token that opens a block at any length is a target at none, so that all lengths are
    scored on the same target tokens.

    Args:
        model: a causal language model of transformers.
        documents: token ids of each document; read twice, the first time to count the windows.
        lengths: evaluation lengths in tokens.
        train_length: the length the model was trained at; the slope is taken from there on.
        tokens_per_batch: tokens of one forward, at least one window.
        max_windows: read so many windows only, spread evenly over all of them.
        sliding_baseline: whether to read the same windows in rows of `train_length` too that move by its half.

    Returns:
        `lengths`: "L" → `loss`, `perplexity`, `median_loss`, `num_tokens`;
        `loss_by_position`: entry p is the mean loss of a token with p tokens before it, at the longest length (`None`
        at 0);
        `in_context_score`: "t" → `score` and `standard_error` of the loss at token t − that at token 50, t = 250, 500,
        1000; the loss at a token is the mean over the tokens within 10 % of it; `None` where the windows are too short.
        It compares different places of the text: only differences between models on the same text mean something;
        `slope`: `slope` (nats per token) and `standard_error` of the straight line through the losses past
        `train_length`, or `None`;
        `unigram_loss`: what the frequencies of the target tokens alone would give, as a yardstick;
        `documents`: the mean losses of each document, see `DocumentLosses.summary`;
        `num_windows`, `num_documents`: how many windows were read, from how many documents;
        `num_short_documents`: how many are too short for a window;
        `sliding_baseline`: `length`, `stride`, `loss`, `perplexity`, `median_loss`, `num_tokens`, if it was asked for:
        what a model makes of the same target tokens without ever reading past `train_length`. At a length L a token
        has between 0 and L − 1 tokens of context, here at least half of `train_length` where the window has them.

    Raises:
        ValueError: for lengths below 2, if no document is as long as the longest length, or for a baseline without a
            training length that is shorter than the longest length.
    """
    lengths = check_lengths(lengths, model)
    if sliding_baseline:
        check_baseline(train_length, lengths[-1])
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"`max_windows` must be at least 1, got {max_windows}.")
    found = WindowLosses(lengths, train_length, sliding_baseline)
    available, num_short = _count_windows(documents, lengths[-1])
    total = min(available, max_windows or available)
    several = f" at {len(lengths)} lengths" if len(lengths) > 1 else ""
    what = f"windows of {lengths[-1]:,} tokens{several}"
    progress = Progress(total, what, "evaluating", "--max_windows {}".format, long=LONG)
    with evaluation_mode(model), progress:
        windows = evenly_spaced(document_windows(documents, lengths[-1]), available, total)
        for group in _grouped(windows, max(1, tokens_per_batch // lengths[-1])):
            tokens = torch.from_numpy(np.stack([window for _, window in group]))
            numbers = [document for document, _ in group]
            found.add_targets(tokens)
            for reading in found.readings:
                if reading == SLIDING:
                    losses = _losses_sliding(model, tokens, train_length, tokens_per_batch)
                else:
                    losses = _losses_in_blocks(model, tokens, reading, tokens_per_batch)
                found.add(reading, numbers, losses)
            progress.update(len(group))
    return found.summary() | {"num_short_documents": num_short}


def check_lengths(lengths: Sequence[int], model: Any = None, name: str = "eval_lengths") -> list[int]:
    """Sorted lengths without repeats; raises `ValueError` for those below 2 or past what the model supports.

    Args:
        lengths: in tokens.
        model: a model or its configuration.
        name: of the argument that messages name.
    """
    limit = getattr(getattr(model, "config", model), "max_positions", None)
    if not lengths or min(lengths) < 2:
        raise ValueError(f"`{name}` must be at least 2 tokens each, got {list(lengths)}.")
    if limit is not None and max(lengths) > limit:
        raise ValueError(
            f"`{name}` must be at most {limit}, the rows of the learned table (`max_position_embeddings`), "
            f"got {max(lengths)}."
        )
    return sorted(set(lengths))


def evenly_spaced(items: Iterable[Any], available: int, total: int) -> Iterator[Any]:
    """→ `total` of the items, of which there are `available`, one in each of so many equal parts."""
    for index, item in enumerate(items):
        if (index + 1) * total // available > index * total // available:
            yield item


def _count_windows(documents: Iterable[Sequence[int]], length: int) -> tuple[int, int]:
    """→ how many windows there are, and how many documents are too short for one."""
    count = longest = 0
    numbers, whole = getattr(documents, "numbers", None), {}
    for index, document in enumerate(documents):
        count, longest = count + len(document) // length, max(longest, len(document))
        number = index if numbers is None else numbers[index]
        whole[number] = whole.get(number, False) or len(document) >= length
    if not count:
        raise ValueError(
            f"`eval_lengths`: no document has {length} tokens, the longest has {longest}; "
            "--cross_document_attention joins them."
        )
    return count, sum(not fits for fits in whole.values())


def check_stride(stride: int, length: int) -> None:
    """Raises `ValueError` unless 1 ≤ stride < length."""
    if not 1 <= stride < length:
        raise ValueError(f"`stride` must lie between 1 and the length − 1 = {length - 1}, got {stride}.")


def check_baseline(train_length: int | None, longest: int) -> None:
    """Raises `ValueError` unless a sliding window of the training length is shorter than the longest length."""
    if not (train_length and 2 <= train_length < longest):
        raise ValueError(
            f"`sliding_baseline` needs a `train_length` of at least 2, below the longest of `eval_lengths`, "
            f"{longest}, got {train_length}."
        )


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _losses_in_blocks(model: Any, windows: torch.Tensor, length: int, tokens_per_batch: int) -> np.ndarray:
    """(B, N) windows, read in blocks of `length` → (B, N) losses, NaN at each block's first token."""
    width = windows.shape[1]
    whole = width // length * length
    losses = torch.full(windows.shape, math.nan)
    for start, end, size in ((0, whole, length), (whole, width, width - whole)):
        if size < 2:  # nothing left, or a single token, which opens a block
            continue
        blocks = windows[:, start:end].reshape(-1, size)
        rows = [token_losses(model, batch) for batch in blocks.split(max(1, tokens_per_batch // size))]
        losses[:, start:end] = torch.cat(rows).reshape(len(windows), end - start)
    return losses.numpy()


def _losses_sliding(model: Any, windows: torch.Tensor, length: int, tokens_per_batch: int) -> np.ndarray:
    """(B, N) windows, read in rows of `length` that move by its half → (B, N) losses, NaN at the first token."""
    losses = np.full(windows.shape, math.nan, dtype=np.float32)
    for window, found in zip(windows.numpy(), losses):
        parts = _scored_once(model, window, length, length // 2, tokens_per_batch)
        found[1:] = np.concatenate([*chain.from_iterable(parts)])
    return losses


def evaluate_sliding(
    model: Any, documents: Iterable[Sequence[int]], length: int, stride: int, tokens_per_batch: int = 16384
) -> dict[str, Any]:
    """Perplexity by a sliding window: each token but a document's first is scored once, at any length and stride.

    Args:
        model: a causal language model of transformers.
        documents: token ids of each document.
        length: tokens of a window.
        stride: tokens by which it moves; each token has at least length − stride tokens of context, as far as its
            document has them.
        tokens_per_batch: tokens of one forward.

    Returns:
        `stride`, `loss`, `perplexity`, `median_loss`, `num_tokens`.

    Raises:
        ValueError: if not 1 ≤ stride < length, or if no document has two tokens.
    """
    (length,) = check_lengths([length], model)
    check_stride(stride, length)
    losses = RunningLoss()
    total = sum(1 + max(0, math.ceil((len(each) - length) / stride)) for each in documents if len(each) > 1)
    progress = Progress(total, f"windows of {length:,} tokens by {stride:,}", "sliding")
    with evaluation_mode(model), progress:
        for document in documents:
            if len(document) < 2:
                continue
            for parts in _scored_once(model, document, length, stride, tokens_per_batch):
                for scored in parts:
                    losses.add(scored)
                progress.update(len(parts))
    if not losses.count:
        raise ValueError("the corpus is too short: no document has two tokens.")
    return {"stride": stride, **losses.summary()}


def _scored_once(
    model: Any, document: Sequence[int], length: int, stride: int, tokens_per_batch: int
) -> Iterator[list[np.ndarray]]:
    """→ batch by batch, for each place of a sliding window the losses of the tokens that none before it has scored."""
    for group in _grouped(_sliding_windows(document, length, stride), max(1, tokens_per_batch // length)):
        rows = token_losses(model, torch.from_numpy(np.stack([tokens for tokens, _ in group]))).numpy()
        yield [row[first:] for row, (_, first) in zip(rows, group)]


def _sliding_windows(document: Sequence[int], length: int, stride: int) -> Iterator[tuple[np.ndarray, int]]:
    """→ a window's tokens and the index of the first one that no window before it has scored."""
    tokens = np.asarray(document, dtype=np.int64)
    scored = 1
    end = min(length, len(tokens))
    while True:
        start = max(0, end - length)
        yield tokens[start:end], scored - start
        if end == len(tokens):
            return
        scored, end = end, min(end + stride, len(tokens))
