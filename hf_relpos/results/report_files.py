"""The figures of a report as files for other programs: two tables as CSV, and the main one for LaTeX."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..environment import write_text
from .estimates import Estimate
from .groups import Group
from .questions import Answer
from .report_tables import Rows


def write_tables(groups: Sequence[Group], found: Sequence[Answer], rows: Rows, folder: Path) -> list[Path]:
    """Writes values.csv, pairs.csv where there are pairs, and table.tex.

    Args:
        groups: the settings.
        found: the answers, whose pairs are written.
        rows: of the main table of the report, which table.tex holds, for LaTeX's package booktabs.
        folder: where to write.

    Returns:
        the paths.
    """
    import pandas  # takes half a second

    texts = {"values.csv": pandas.DataFrame(_values(groups)).to_csv(index=False, lineterminator="\n")}
    if pairs := [row for answer in found for row in _pairs(answer)]:
        texts["pairs.csv"] = pandas.DataFrame(pairs).to_csv(index=False, lineterminator="\n")
    head, *body = rows
    columns = "l" + "r" * (len(head) - 1)
    texts["table.tex"] = pandas.DataFrame(body, columns=head).to_latex(index=False, escape=True, column_format=columns)
    for name, text in texts.items():
        write_text(folder / name, text)
    return [folder / name for name in texts]


def _values(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """A row for each setting and length: perplexity or score, with the ends of the 95 % interval."""
    for group in groups:
        for place in group.conditions() if group.score_name else group.lengths():
            if group.score_name:
                found = Estimate.of(np.array([[score] for score in group.values(place, "score").values()]))
                ends = [found.mean, found.low, found.high]
            else:
                found = Estimate.of(np.stack(list(group.losses(place).values())), group.document_weights)
                ends = [math.exp(min(x, 700.0)) for x in (found.mean, found.low, found.high)]
            yield {
                "setting": group.label,
                "measure": group.score_name or "perplexity",
                "length": place,
                **dict(zip(("mean", "low", "high"), ends)),
                "seeds": found.num_runs,
                "documents": group.num_documents,
            }


def _pairs(answer: Answer) -> Iterator[dict[str, Any]]:
    """A row for each pair of a question: first − second, in nats or points of the score."""
    for pair in answer.pairs:
        each = pair.difference
        yield {
            "question": f"{answer.question.title} ({answer.question.place})",
            "first": pair.first,
            "second": pair.second,
            "difference": each.mean,
            "low": each.low,
            "high": each.high,
            "unit": "score" if answer.question.is_score else "nats",
            "p": each.p_value,
            "corrected_p": pair.corrected,
            "resolved": pair.resolved,
            "seeds": each.num_runs,
            "documents": answer.num_documents,
        }
