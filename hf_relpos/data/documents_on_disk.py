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


DOCUMENTS = Features({"text": Value("string")})


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
        write_documents(folder / "documents.arrow", read(tally), num_bytes)
        return asdict(tally)

    rows, facts = cached_rows("documents", key, make)
    return rows, Tally(**facts)


def write_documents(path: Path, texts: Iterable[str], num_bytes: int = 0) -> None:
    """Writes documents to a file of Arrow, column "text".

    Args:
        path: the file.
        texts: the documents.
        num_bytes: of what they are read from; from 64 MB on a bar shows how many there are.
    """
    schema = DOCUMENTS.arrow_schema
    bar = datasets.utils.tqdm(desc="Reading", unit=" documents", disable=num_bytes < 2**26)
    with pyarrow.OSFile(str(path), "wb") as file, bar, pyarrow.ipc.new_stream(file, schema) as writer:
        for batch in _batches(texts):
            writer.write_table(pyarrow.table({"text": batch}, schema=schema))
            bar.update(len(batch))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of some 1000 documents, fewer where they are long."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if len(batch) == 1000 or size > 2**26:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
