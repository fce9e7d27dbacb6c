"""The view of the attention: the weight that one head gives to the keys, by distance, on a text."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..evaluation.loss_by_length import evaluation_mode
from ..inference.request_checks import check_number
from .drawing import INK, SIZES, TABLE, PageModel, check_text, counted, label, legend, mark_training, render, svg


MAX_READ = 1024  # tokens of a text: the weights of a layer are a matrix for each head
POINTS_PER_OCTAVE = 8
LEAST = 1e-6  # weight that is drawn
COLUMNS = ("tokens read", "half of the weight lies within (tokens)", "on the token itself", "on the first token")
NOTE = (
    "Mean over the queries that have a key at the distance, from the second token on, and over an eighth of an octave. "
    f"Grey: the same weight for all keys. Below {LEAST:g} nothing is drawn, at most {MAX_READ} tokens are read. "
    "Heads are in no order: a number means something else in each model."
)


def attention_weights(entry: PageModel, text: str, layer: int, head: int) -> np.ndarray:
    """The weights of one head on the first `MAX_READ` tokens of a text.

    Returns:
        (queries, keys), fp32; each row sums to 1.

    Raises:
        ValueError: for a text of fewer than two tokens, or a layer or head that the model does not have.
    """
    check_text("text", text)
    config = entry.model.config
    for name, value, count in (("layer", layer, config.num_hidden_layers), ("head", head, config.num_attention_heads)):
        if value >= count:
            raise ValueError(f"No {name} {value}: this model has {name}s 0 to {count - 1}.")
    tokens = entry.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"].long()
    if tokens.shape[1] < 2:
        raise ValueError(f"The text has {counted(tokens.shape[1])}: a distance needs at least 2.")
    tokens = tokens[:, : min(MAX_READ, config.max_positions or MAX_READ)]
    found: list[torch.Tensor] = []
    attention = entry.model.model.layers[layer].self_attn
    hook = attention.register_forward_hook(lambda module, inputs, output: found.append(output[1][0, head].float()))
    before = config._attn_implementation
    entry.model.set_attn_implementation("eager")  # the others do not compute the weights
    try:
        with evaluation_mode(entry.model):
            entry.model.model(input_ids=tokens.to(entry.model.device), use_cache=False)
    finally:
        hook.remove()
        entry.model.set_attn_implementation(before)
    return found[0].cpu().numpy()


def mean_by_distance(weights: np.ndarray) -> np.ndarray:
    """The mean weight at each distance, over the queries that have a key there; the first query, which has no choice,
    is left out.

    Args:
        weights: (Q, Q), as `attention_weights` returns them.

    Returns:
        (Q,): of distance 0 to Q − 1.
    """
    diagonals = (np.diagonal(weights, -distance)[distance == 0 :] for distance in range(len(weights)))
    return np.array([diagonal.mean() for diagonal in diagonals])


def attention_page(entries: Sequence[PageModel], text: str, layer: int, head: int) -> str:
    """→ a plot of the mean weight by distance with a line for each model, and a table of where half of it lies."""
    try:
        for name, value in (("layer", layer), ("head", head)):
            check_number(name, value, 0, 10**6)
    except ValueError as error:
        return render(TABLE, rows=[(entry, (), str(error)) for entry in entries], columns=COLUMNS)
    rows, curves = [], []
    for entry in entries:
        try:
            weights = attention_weights(entry, text, int(layer), int(head))
        except ValueError as error:
            rows.append((entry, (), str(error)))
            continue
        curves.append((entry, label(entry, entries), mean_by_distance(weights)))
        rows.append((entry, _cells(weights), ""))
    title = f"Attention by distance, layer {layer}, head {head}"
    plots = [svg(_draw, size, title, curves) for size in SIZES if curves]
    return render(TABLE, plots=plots, rows=rows, columns=COLUMNS, notes=[NOTE] if curves else [])


def _cells(weights: np.ndarray) -> list[Any]:
    """Means over the queries from the second one on."""
    queries = np.arange(1, len(weights))
    sums = np.array([np.diagonal(weights, -distance)[distance == 0 :].sum() for distance in range(len(weights))])
    half = int(np.searchsorted(np.cumsum(sums), len(queries) / 2))
    shares = (weights[queries, queries].mean(), weights[queries, 0].mean())
    return [len(weights), half, *(f"{100 * share:.1f} %" for share in shares)]


def _draw(axes: Any, curves: Sequence[tuple[PageModel, str, np.ndarray]]) -> None:
    count = max(len(means) for _, _, means in curves)
    equal = np.tril(np.ones((count, count))) / np.arange(1, count + 1)[:, None]
    axes.plot(*_smooth(mean_by_distance(equal)), color=INK, alpha=0.45, linewidth=1.2, label="equal weights")
    for entry, name, means in curves:
        axes.plot(*_smooth(means), color=entry.color, linewidth=2, label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.set(xlabel="distance + 1 (tokens)", ylabel="mean weight of a key")
    axes.set_ylim(bottom=max(LEAST, axes.get_ylim()[0]))
    mark_training([entry for entry, _, _ in curves if (entry.model.config.train_length or 0) <= count], axes)
    legend(axes)


def _smooth(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """→ distance + 1 and the weight there, each a mean over an eighth of an octave; a weight of 0 is not drawn."""
    places = np.arange(1, len(means) + 1)
    bins = np.round(np.log2(places) * POINTS_PER_OCTAVE)
    starts = np.flatnonzero(np.diff(bins, prepend=-1))
    counts = np.diff(starts, append=len(means))
    weights = np.add.reduceat(means, starts) / counts
    return np.add.reduceat(places, starts) / counts, np.where(weights > 0, weights, np.nan)
