"""Documents as a file of Arrow, which is read from disk."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow
from datasets import Dataset, Features, Value

from .cache import cached_rows
from .documents import Tally


DOCUMENTS = Features({"text": Value("string")})  # of streams
# rows with one number are pieces of one document, which stand one after the other
NUMBERED = Features({"text": Value("string"), "document": Value("int64")})


def keep_documents(key: list[Any], read: Callable[[Tally], Iterable[str]], num_bytes: int = 0) -> tuple[Dataset, Tally]:
    """Documents → a data set on disk, cached.

    Args:
        key: JSON values, all that the documents depend on.
        read: → the documents; it counts up the tally.
        num_bytes: as in `write_documents`.

    Returns:
        the data set, and what became of the texts.
    """

    def make(folder: Path) -> dict[str, int]:
        tally = Tally()
        write_documents(folder / "documents.arrow", read(tally), tally, num_bytes)
        return asdict(tally)

    rows, facts = cached_rows("documents", key, make)
    return rows, Tally(**facts)


def write_documents(path: Path, texts: Iterable[str], tally: Tally, num_bytes: int = 0) -> None:
    """Writes documents, or the pieces of those that are cut, to a file of Arrow with the columns of `NUMBERED`.

    Args:
        path: the file.
        texts: the documents.
        tally: that reading them counts up.
        num_bytes: of what they are read from; from 64 MB on a bar shows how many there are.
    """
    schema = NUMBERED.arrow_schema
    bar = datasets.utils.tqdm(desc="Reading", unit=" documents", disable=num_bytes < 2**26)
    with pyarrow.OSFile(str(path), "wb") as file, bar, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _batches((text, tally.document) for text in texts):
            columns = dict(zip(NUMBERED, zip(*batch)))
            writer.write_table(pyarrow.table({name: list(column) for name, column in columns.items()}, schema=schema))
            bar.update(len(batch))


def _batches(rows: Iterable[tuple[str, int]]) -> Iterator[list[tuple[str, int]]]:
    """Lists of some 1000 documents, fewer where they are long."""
    batch, size = [], 0
    for row in rows:
        batch.append(row)
        size += len(row[0])
        if len(batch) == 1000 or size > 2**26:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
