"""The view of the losses: how well each model predicts a text, by position, as a difference to the first model.

The difference is that on the same text, so that what is hard in it cancels. Where all tokenizers cut the text at the
same places it is told per token. Otherwise per byte: losses are summed between the places where both models have an end
of a token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..evaluation.loss_by_length import evaluation_mode, token_losses
from ..evaluation.loss_sums import RunningLoss
from ..results.result_file import smooth_by_position
from .drawing import MAX_TOKENS, SIZES, TABLE, PageModel, check_text, counted, label, legend, mark_training, render, svg


MIN_POINTS = 8  # tokens, or pieces of text, of a mean that is drawn
BINS_PER_OCTAVE = 2


@dataclass(frozen=True)
class TextLosses:
    """What a model loses on a text.

    Attributes:
        entry: the model.
        losses: (N,) nats, of each token; the first one is NaN: nothing comes before it.
        ends: (M,) bytes up to the end of each of the M tokens that are text, in order; `None` where the tokenizer does
            not say it, or has read some of the text as unknown.
        text_losses: (M,) the losses of these alone.
        reason: why `ends` is `None`.
    """

    entry: PageModel
    losses: np.ndarray
    ends: np.ndarray | None
    text_losses: np.ndarray
    reason: str = ""


@dataclass(frozen=True)
class Difference:
    """The loss of a model minus that of another on the same text.

    Attributes:
        entry: the model.
        positions: (P,) tokens or bytes of context of each piece of text.
        values: (P,) the difference, nats or bits.
        sizes: (P,) tokens, all 1, or bytes.
    """

    entry: PageModel
    positions: np.ndarray
    values: np.ndarray
    sizes: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.sizes.sum())

    def means(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """→ mean position, difference per token or byte and its standard error, of half an octave or of `MIN_POINTS`
        pieces, whichever is more; what is left at the end belongs to the last mean."""
        starts, start, reached = [], 0, self.positions + 1
        while start + MIN_POINTS <= len(reached):
            reach = reached[start] * 2 ** (1 / BINS_PER_OCTAVE)
            if reach > reached[-1] and len(starts) > 1:  # the text does not fill it
                break
            starts.append(start)
            start = max(start + MIN_POINTS, int(np.searchsorted(reached, reach)))
        rows = [self._mean(part) for part in map(slice, starts, [*starts[1:], None])]
        return tuple(np.array(rows).reshape(-1, 3).T)

    def _mean(self, part: slice) -> tuple[float, float, float]:
        values, sizes = self.values[part], self.sizes[part]
        rate, count = values.sum() / sizes.sum(), len(values)
        spread = ((values - rate * sizes) ** 2).sum() * count / (count - 1)
        return np.exp(np.log(self.positions[part] + 1).mean()), rate, math.sqrt(spread) / sizes.sum()


def losses_by_position(entry: PageModel, text: str) -> np.ndarray:
    """The loss of each token of `text` given all before it.

    Returns:
        (tokens,) nats; the first one is NaN: nothing comes before it.

    Raises:
        ValueError: if the text is too short for a loss, or too long for the model or this page.
    """
    return read_losses(entry, text).losses


def read_losses(entry: PageModel, text: str) -> TextLosses:
    """The losses of a model on a text, with where its tokens end; raises `ValueError` as `losses_by_position`."""
    check_text("text", text)
    is_fast = getattr(entry.tokenizer, "is_fast", False)
    more = {"return_offsets_mapping": True, "return_special_tokens_mask": True} if is_fast else {}
    encoded = entry.tokenizer(text, return_tensors="pt", verbose=False, **more)
    tokens = encoded["input_ids"]
    count, limit = tokens.shape[1], entry.model.config.max_positions
    if count < 2:
        raise ValueError(f"The text has {counted(count)}: a loss needs at least 2.")
    if limit is not None and count > limit:
        raise ValueError(f"The text has {count} tokens, past the {limit} positions of the learned table.")
    if count > MAX_TOKENS:
        raise ValueError(f"The text has {count} tokens: this page reads at most {MAX_TOKENS}.")
    with evaluation_mode(entry.model):
        losses = token_losses(entry.model, tokens.long())[0].numpy()
    if not is_fast:
        return TextLosses(entry, losses, None, losses, "its tokenizer does not say where in the text its tokens end")
    is_text = encoded["special_tokens_mask"][0].numpy() == 0
    if unknown := int((tokens[0].numpy()[is_text] == entry.tokenizer.unk_token_id).sum()):
        return TextLosses(entry, losses, None, losses, f"its tokenizer has no token for {unknown} places of the text")
    places = np.cumsum([0, *(len(character.encode()) for character in text)])  # of characters, in bytes
    ends = places[encoded["offset_mapping"][0].numpy()[is_text, 1]]
    return TextLosses(entry, losses, np.maximum.accumulate(ends), losses[is_text])


def differences(read: Sequence[TextLosses]) -> tuple[list[Difference], bool]:
    """→ the differences to the first, also its own, which is 0, and whether they are per token; else per byte.

    Args:
        read: with their `ends`.
    """
    first = read[0]
    is_per_token = all(np.array_equal(each.ends, first.ends) for each in read)
    return [(_by_token if is_per_token else _by_byte)(each, first) for each in read], is_per_token


def _by_token(each: TextLosses, first: TextLosses) -> Difference:
    values = each.text_losses.astype(np.float64) - first.text_losses
    known = ~np.isnan(values)
    return Difference(each.entry, np.flatnonzero(known), values[known], np.ones(known.sum()))


def _by_byte(each: TextLosses, first: TextLosses) -> Difference:
    """Between the ends that both have, from the first one on after which both predict."""
    sums = []
    for losses in (each, first):
        last = np.flatnonzero(np.diff(losses.ends, append=-1))  # of tokens that share a character, the last one
        sums.append((losses.ends[last], np.cumsum(np.nan_to_num(losses.text_losses, nan=0.0), dtype=np.float64)[last]))
    (ends, total), (first_ends, first_total) = sums
    common, here, there = np.intersect1d(ends, first_ends, return_indices=True)
    starts = [losses.ends[np.isnan(losses.text_losses)].max(initial=0) for losses in (each, first)]
    known = (common >= max(starts)) & (common > 0)
    total, first_total, common = total[here][known], first_total[there][known], common[known]
    if max(starts) == 0:  # both predict the first character
        total, first_total, common = (np.concatenate(([0], values)) for values in (total, first_total, common))
    values = (np.diff(total) - np.diff(first_total)) / math.log(2)
    return Difference(each.entry, common[:-1], values, np.diff(common).astype(np.float64))


def losses_page(entries: Sequence[PageModel], text: str) -> str:
    """→ the plot of the losses by position, of several models as differences, and a table of their perplexities."""
    read, errors = [], {}
    for index, entry in enumerate(entries):
        try:
            read.append(read_losses(entry, text))
        except ValueError as error:
            errors[index] = str(error)
    compared = [each for each in read if each.ends is not None]
    found, is_per_token = differences(compared) if compared else ([], True)
    is_difference = len(found) > 1
    unit = "nats per token" if is_per_token else "bits per byte"
    names = [f"minus {label(found[0].entry, entries)} ({unit})"] if is_difference else []
    means = {id(each.entry): f"{each.mean:+.3f}" for each in found[1:] if len(each.values)}
    rows, done = [], iter(read)
    for index, entry in enumerate(entries):
        cells = () if index in errors else _cells(next(done)) + [means.get(id(entry), "–")] * len(names)
        rows.append((entry, cells, errors.get(index, "")))
    if is_difference:
        drawn = (found, compared, is_per_token, [label(each.entry, entries) for each in found])
        plots = [svg(_draw_differences, size, "Difference of the loss by position", *drawn) for size in SIZES]
    else:
        plots = [svg(_draw_losses, size, "Loss by position", read) for size in SIZES if read]
    columns = ("tokens", "loss (nats per token)", "perplexity", "of it within the training length", "of it past that")
    notes = _notes(read, found, is_per_token, entries)
    return render(TABLE, plots=plots, rows=rows, columns=(*columns, *names), notes=notes)


def _cells(read: TextLosses) -> list[Any]:
    losses = read.losses
    length = read.entry.model.config.train_length or len(losses)
    parts = [_perplexity(part) for part in (losses, losses[:length], losses[length:])]
    return [len(losses), f"{np.nanmean(losses, dtype=np.float64):.3f}", *parts]


def _perplexity(losses: np.ndarray) -> str:
    running = RunningLoss()
    running.add(losses)
    return f"{running.summary()['perplexity']:.4g}" if running.count else "–"


def _notes(
    read: Sequence[TextLosses], found: Sequence[Difference], is_per_token: bool, entries: Sequence[PageModel]
) -> list[str]:
    """What is drawn, what it is on, and what cannot be compared."""
    notes = [f"No difference for {each.entry.name}: {each.reason}." for each in read if each.ends is None]
    if len(found) > 1:
        piece = "tokens" if is_per_token else "pieces of text"
        notes.append(
            f"Lines: loss minus that of {label(found[0].entry, entries)} on the same text, lower is better; means over "
            f"half an octave, at least {MIN_POINTS} {piece}. Bands: two standard errors over these {piece}; "
            "another text, or another seed, differs by more. Dotted: the training length."
        )
    elif read:
        notes.append("Faint: each token. Strong: means over a quarter of an octave. Dotted: the training length.")
    if not is_per_token:
        notes.append(
            "The tokenizers cut the text differently: perplexities per token cannot be compared, so the difference is "
            "that of the loss between places where both have an end of a token, in bits per byte of the text."
        )
    return [*notes, "The text is the one above, no split of a corpus."]


# --- drawing


def _draw_differences(
    axes: Any, found: Sequence[Difference], read: Sequence[TextLosses], is_per_token: bool, labels: Sequence[str]
) -> None:
    axes.axhline(0, color=found[0].entry.color, linewidth=2, label=labels[0])
    for each, name in zip(found[1:], labels[1:]):
        positions, means, errors = each.means()
        style = {"color": each.entry.color, "linewidth": 2, "marker": "" if len(means) > 1 else "o"}
        axes.plot(positions, means, label=name, **style)
        low, high = means - 2 * errors, means + 2 * errors
        axes.fill_between(positions, low, high, color=each.entry.color, alpha=0.16, linewidth=0)
    axes.set_xscale("log", base=2)
    unit, place = ("nats per token", "tokens") if is_per_token else ("bits per byte", "bytes")
    axes.set(xlabel=f"position ({place} of context)", ylabel=f"difference of the loss ({unit})")
    legend(axes)
    if is_per_token:
        mark_training([each.entry for each in found], axes)
        return
    longest = max(int(each.ends[-1]) for each in read)
    for each in read:
        length = each.entry.model.config.train_length
        if length and length <= len(each.ends) and each.ends[length - 1] < longest:
            axes.axvline(each.ends[length - 1], color=each.entry.color, alpha=0.8, linestyle=":", linewidth=1.2)


def _draw_losses(axes: Any, read: Sequence[TextLosses]) -> None:
    for each in read:
        losses, color = each.losses, each.entry.color
        axes.plot(np.arange(1, len(losses)), losses[1:], color=color, alpha=0.22, linewidth=0.8)
        positions, means = smooth_by_position([None, *losses[1:].tolist()])
        axes.plot(positions, means, color=color, linewidth=2, marker="" if len(means) > 1 else "o")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens of context)", ylabel="loss (nats per token)")
    mark_training([each.entry for each in read], axes)
