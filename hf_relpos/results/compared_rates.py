"""The learning rates that a comparison tried for each scheme: kept beside its results, and a table of its report."""

import json
from collections.abc import Mapping
from pathlib import Path

from ..environment import write_text
from ..file_reading import read_json, reading


TRIED = "learning_rates.json"  # in the folder of a comparison
Tried = Mapping[str, Mapping[float, float | None]]  # scheme → rate → validation loss, `None` where training diverged
NOTE = (
    "Loss on the validation text at the training length, of one run each; * the lowest, which all seeds were trained "
    "with. Where it is the lowest or the highest rate of its row, a better one may lie beyond."
)


def save_tried(root: Path, tried: Tried) -> None:
    """Writes what was tried to the folder of a comparison."""
    write_text(root / TRIED, json.dumps({scheme: list(losses.items()) for scheme, losses in tried.items()}, indent=1))


def tried_rows(root: Path) -> list[list[str]] | None:
    """→ a row for each scheme, a column for each rate, the head first; `None` where no comparison wrote any.

    Raises:
        ValueError: if the file cannot be read as one.
    """
    path = root / TRIED
    if not path.is_file():
        return None
    content = read_json(path, "learning rates")
    with reading(f"learning rates {str(path)!r} cannot be read"):
        tried = {str(scheme): {float(rate): loss for rate, loss in losses} for scheme, losses in content.items()}
        rates = sorted({rate for losses in tried.values() for rate in losses})
        rows = [["scheme", *(f"{rate:g}" for rate in rates)]]
        for scheme, losses in tried.items():
            best = min((loss for loss in losses.values() if loss is not None), default=None)
            rows.append([scheme, *(_cell(losses, rate, best) for rate in rates)])
    return rows


def _cell(losses: Mapping[float, float | None], rate: float, best: float | None) -> str:
    if rate not in losses:
        return "–"
    loss = losses[rate]
    return "diverged" if loss is None else f"{loss:.4f}" + ("*" if loss == best else "")
