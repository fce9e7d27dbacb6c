"""Documents of files: one reader for each kind of file, and text → documents of bounded length."""

import csv
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import pyarrow
import pyarrow.parquet

from .files import CHUNK, FileList, open_text, read_text


@dataclass
class Tally:
    """What became of the texts (rows of a table, text files) of one split.

    Attributes:
        num_empty: texts that hold nothing but white space, which are dropped.
        num_separated: texts that the separator splits into several documents.
        num_cut, num_pieces: documents that are too long, and the pieces that they are cut into.
    """

    num_empty: int = 0
    num_separated: int = 0
    num_cut: int = 0
    num_pieces: int = 0
    # documents that ended before the one that a piece belongs to, while pieces are read; no field: it is not kept
    document: ClassVar[int] = 0


def read_documents(files: FileList, column: str, separator: str, limit: int, tally: Tally) -> Iterator[str]:
    """The documents of files, in order; see `split_text`.

    Args:
        files: which, and of what kind.
        column: of tables, the one that holds the text.
        separator, limit, tally: as `split_text` takes them.

    Raises:
        ValueError: naming the file, for what is no file of its kind, no UTF-8, has no such column or no text in it.
    """
    for path in files.paths:
        try:
            for pieces in READERS[files.kind](path, column):
                yield from split_text(pieces, separator, limit, tally)
        except (ValueError, OSError, RecursionError, Warning, pyarrow.ArrowException) as error:
            if type(error) is ValueError:  # of this package; those of libraries know neither flag nor file
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"`{files.flag}` {str(path)!r} cannot be read as {files.kind}: {reason}") from error


# --- text → documents


def split_text(pieces: Iterable[str], separator: str, limit: int, tally: Tally) -> Iterator[str]:
    """One text → its documents that are not blank.

    Args:
        pieces: the text, in pieces of any length.
        separator: stands between documents and belongs to none; empty if the text is one document.
        limit: a longer document is cut at line ends, or where it has none, so that no piece has more characters.
        tally: is counted up.
    """
    num_documents = num_pieces = num_kept = 0
    for part, is_last in _parts(pieces, separator, limit):
        if part.strip():
            num_pieces += 1
            num_kept += 1
            yield part
        if is_last:
            tally.document += 1
            if num_pieces > 1:
                tally.num_cut += 1
                tally.num_pieces += num_pieces
            num_documents += 1
            num_pieces = 0
    tally.num_empty += num_kept == 0
    tally.num_separated += num_documents > 1


def _parts(pieces: Iterable[str], separator: str, limit: int) -> Iterator[tuple[str, bool]]:
    """→ the documents in parts of at most `limit` characters, and whether a part is the last of its document.

    A document's byte order mark (U+FEFF) is left out.
    """
    rest, at_start = "", True
    for piece in pieces:
        rest += piece
        if at_start:
            rest = rest.lstrip("\ufeff")
        head, *others = rest.split(separator) if separator else [rest]
        *whole, rest = [head, *(other.lstrip("\ufeff") for other in others)]
        at_start = not rest and (at_start or bool(whole))
        for document in whole:
            *parts, last = _cut(document, limit)
            yield from ((part, False) for part in parts)
            yield last, True
        *parts, rest = _cut(rest, limit, len(separator))  # a separator may lie across two pieces
        yield from ((part, False) for part in parts)
    *parts, last = _cut(rest, limit)
    yield from ((part, False) for part in parts)
    yield last, True


def _cut(text: str, limit: int, reserve: int = 0) -> list[str]:
    """→ the text, cut at line ends into parts of at most `limit` characters; the last has up to `reserve` more."""
    parts, start = [], 0
    while len(text) - start > limit + reserve:
        end = text.rfind("\n", start, start + limit) + 1 or start + limit
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


class _Unreadable(ValueError):
    """What is wrong with a file, for `read_documents` to name the file."""


# --- readers: a file and the column of its text → the pieces of one text after the other


def _read_text(path: Path, column: str) -> Iterator[Iterable[str]]:
    yield read_text(path)


def _read_csv(path: Path, column: str) -> Iterator[Iterable[str]]:
    """Every field is the text that stands there: "NA", "null" and "007" too."""
    import pandas  # takes half a second

    options: dict[str, Any] = {"dtype": str, "na_filter": False, "index_col": False, "chunksize": 1000}
    with open_text(path) as file:
        try:
            names = next(csv.reader(file), [])
        except csv.Error as error:  # it has no header, and begins with a long document
            raise _Unreadable(f"its first row must name the columns: {error}") from error
        if names.count(column) > 1:
            raise _Unreadable(f"{column!r} stands twice in the first row")
    with open_text(path) as file:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pandas.errors.ParserWarning)  # of a first row longer than the header
            chunks = pandas.read_csv(file, **options)
            first = next(chunks)
        for chunk in chain([first], chunks):
            check_column(column, [str(name) for name in chunk.columns])
            yield from map(pieces, chunk[column])


def _read_parquet(path: Path, column: str) -> Iterator[Iterable[str]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        schema = file.schema_arrow
        check_column(column, schema.names)
        if schema.names.count(column) > 1:
            raise _Unreadable(f"it has two columns {column!r}")
        check_text_type(column, schema.field(column).type)
        for batch in file.iter_batches(batch_size=32, columns=[column]):
            yield from (pieces(text or "") for text in batch.column(0).to_pylist())


def _read_json(path: Path, column: str) -> Iterator[Iterable[str]]:
    seen: dict[str, None] = {}
    has_column = False
    for number, row in _json_rows(path, column):
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise _Unreadable(f"row {number} is no object but {type(row).__name__}")
        text = row.get(column)
        if text is not None and not isinstance(text, str):
            kind = type(text).__name__
            where = f"{str(path)!r}, row {number}"
            raise ValueError(f"`text_column` must hold text, got {column!r} of type {kind} in {where}.")
        has_column = has_column or column in row
        if len(seen) < 100:
            seen.update(dict.fromkeys(row))
        yield pieces((text or "").encode().decode())  # a lone surrogate is no text
    if seen and not has_column:
        check_column(column, list(seen))


def _json_rows(path: Path, column: str) -> Iterator[tuple[int, Any]]:
    """→ number and value of each row: of JSON lines, of a list, or of values that take several lines each."""

    def make(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if sum(name == column for name, _ in pairs) > 1:
            raise _Unreadable(f"{column!r} stands twice in one object")
        return dict(pairs)

    # numbers do not count here, and Python makes none of thousands of digits
    decoder = json.JSONDecoder(object_pairs_hook=make, parse_int=lambda digits: int(digits[:9]))
    is_first = True
    with open_text(path, newline="\n") as file:
        for number, line in enumerate(file, 1):
            line = line.lstrip("\ufeff").strip()
            if not line:
                continue
            try:
                value = decoder.decode(line)
            except json.JSONDecodeError as error:
                if is_first:
                    yield from _json_values(f"{line}\n{file.read()}", number, decoder)
                    return
                raise _Unreadable(f"line {number}: {error.msg}") from error
            yield from enumerate(value, 1) if is_first and isinstance(value, list) else [(number, value)]
            is_first = False


def _json_values(text: str, first_line: int, decoder: json.JSONDecoder) -> Iterator[tuple[int, Any]]:
    """→ number and value of each row, of values one after the other; a list holds rows."""
    index = row = 0
    while index < len(text):
        try:
            value, index = decoder.raw_decode(text, index)
        except json.JSONDecodeError as error:
            raise _Unreadable(f"line {first_line + error.lineno - 1}: {error.msg}") from error
        for each in value if isinstance(value, list) else [value]:
            row += 1
            yield row, each
        index = re.compile(r"\s*").match(text, index).end()


def check_column(column: str, columns: list[str]) -> None:
    """Raises `ValueError` if there is no such column."""
    if column not in columns:
        raise ValueError(f"`text_column` must be one of {columns}, got {column!r}.")


def check_text_type(column: str, kind: pyarrow.DataType) -> None:
    """Raises `ValueError` if a column of this type holds no text."""
    values = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_text = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_string_view)
    if not any(check(values) for check in (*is_text, pyarrow.types.is_null)):
        raise ValueError(f"`text_column` must hold text, got {column!r} of type {kind}.")


def pieces(text: str) -> Iterator[str]:
    """A text in pieces of a few million characters, as `split_text` takes it."""
    return (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))


READERS: dict[str, Callable[[Path, str], Iterator[Iterable[str]]]] = {
    "text": _read_text,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
