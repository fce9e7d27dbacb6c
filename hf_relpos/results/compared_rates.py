"""The learning rates that a comparison tried for each scheme: kept beside its results, and a table of its report."""

import json
from collections.abc import Mapping, Sequence
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


def read_tried(root: Path) -> Tried | None:
    """What `save_tried` wrote; `None` where no comparison wrote any.

    Raises:
        ValueError: if the file cannot be read as one.
    """
    path = root / TRIED
    if not path.is_file():
        return None
    content = read_json(path, "learning rates")
    with reading(f"learning rates {str(path)!r} cannot be read"):
        return {
            str(scheme): {float(rate): None if loss is None else float(loss) for rate, loss in losses}
            for scheme, losses in content.items()
        }


def tried_rows(root: Path) -> list[list[str]] | None:
    """→ a row for each scheme, a column for each rate, the head first; `None` where no comparison wrote any.

    Raises:
        ValueError: as `read_tried`.
    """
    tried = read_tried(root)
    if tried is None:
        return None
    rates = sorted({rate for losses in tried.values() for rate in losses})
    rows = [["scheme", *(f"{rate:g}" for rate in rates)]]
    for scheme, losses in tried.items():
        best = min((loss for loss in losses.values() if loss is not None), default=None)
        rows.append([scheme, *(_cell(losses, rate, best) for rate in rates)])
    return rows


def edge_text(root: Path, schemes: Sequence[str] | None = None) -> str:
    """A sentence about the schemes whose chosen learning rate is the lowest or the highest of those tried for it; empty
    where there is none, or where no comparison wrote any.

    Args:
        root: folder of a comparison.
        schemes: of which it is said; all by default.

    Raises:
        ValueError: as `read_tried`.
    """
    edges: dict[str, list[str]] = {"lowest": [], "highest": []}
    for scheme, losses in (read_tried(root) or {}).items():
        known = {rate: loss for rate, loss in losses.items() if loss is not None}
        if not known or len(losses) < 2 or (schemes is not None and scheme not in schemes):
            continue
        best = min(known, key=known.__getitem__)
        for name, edge in zip(edges, (min(losses), max(losses))):
            edges[name] += [f"{scheme} ({best:g})"] if best == edge else []
    found = [f"the {name} that was tried for {', '.join(names)}" for name, names in edges.items() if names]
    if not found:
        return ""
    return f"The chosen learning rate is {' and '.join(found)}: a better one may lie beyond, and the order may change."


def _cell(losses: Mapping[float, float | None], rate: float, best: float | None) -> str:
    if rate not in losses:
        return "–"
    loss = losses[rate]
    return "diverged" if loss is None else f"{loss:.4f}" + ("*" if loss == best else "")
