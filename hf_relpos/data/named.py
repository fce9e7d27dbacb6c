"""Data sets by name, of the Hub or of a folder here, as the library `datasets` reads them."""

import glob
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from datasets.packaged_modules.csv.csv import Csv

from ..environment import place_name
from .arguments import TextArguments
from .cache import MAKING, cache_root, cached, say
from .documents import Tally, check_column, check_text_type, pieces, split_text
from .documents_on_disk import DOCUMENTS, keep_documents, write_documents
from .files import FileList, content_hash, file_type, inside


SPLITS = ("train", "validation", "test")
# what the description of a data set may say of its files without changing how they are read
NEUTRAL_OPTIONS = {"name", "version", "data_dir", "data_files", "description", "features"}


@dataclass
class NamedData:
    """What a data set gives, by split: its files where this package reads them itself, else its documents.

    Attributes:
        name: what to call it in a result.
        lists: the files, empty for documents.
        splits: the documents, in column "text".
        tallies: what became of the texts of each split; of streams it is not known.
        files: of a folder here that `datasets` reads: file → hash of its bytes.
    """

    name: str
    lists: dict[str, FileList] = field(default_factory=dict)
    splits: dict[str, Dataset | IterableDataset] = field(default_factory=dict)
    tallies: list[Tally] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)


def read_named(args: TextArguments, how: tuple[str, str, int]) -> NamedData:
    """The data set of `args.dataset_name`.

    Args:
        args: filled.
        how: column of the text, separator and limit of documents, as `split_text` takes them.

    Raises:
        ValueError: if it cannot be loaded, has no train or validation split, or no text in its column.
    """
    source = _Source(args)
    builder = source.builder()
    found = NamedData("/".join(filter(None, (place_name(args.dataset_name), args.dataset_config_name))))
    found.lists = source.in_order(_local_files(args.dataset_name, builder))
    if found.lists:
        return found
    found.files = _file_hashes(args.dataset_name, builder)
    if args.streaming:
        rows = source.in_order(source.load(builder))
        found.splits = {split: _stream_documents(rows[split], how) for split in rows}
    elif found.files:
        _keep_files(source, builder, found, how)
    else:
        for rows in (loaded := source.in_order(source.load_whole(builder))).values():
            _check_rows(rows, how[0])
        for split, rows in loaded.items():
            key = ["named", rows._fingerprint, *how]
            found.splits[split], tally = keep_documents(key, lambda tally: _split_column(rows, how, tally))  # noqa: B023
            found.tallies.append(tally)
    return found


class _Source:
    """A data set by its name, and the calls of `datasets` that read it, each with one clear error."""

    def __init__(self, args: TextArguments) -> None:
        self.name, self.config, self.streaming = args.dataset_name, args.dataset_config_name, args.streaming

    def builder(self) -> Any:
        self._take_away_damage()
        try:
            return datasets.load_dataset_builder(self.name, self.config)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise self._failed(error) from error

    def _take_away_damage(self) -> None:
        """Takes away what `datasets` noted of this data set in its cache and cannot read any more."""
        root, last = Path(datasets.config.HF_DATASETS_CACHE), glob.escape(Path(self.name).name)
        for path in root.glob(f"*{last}/*/*/*/dataset_info.json"):
            try:
                datasets.DatasetInfo.from_directory(str(path.parent))
            except Exception as error:  # it may hold anything
                say(f"damaged cache, made anew: {path.parent}: {error}")
                path.unlink(missing_ok=True)

    def load(self, builder: Any, **options: Any) -> Any:
        try:
            return self._load(builder, **options)
        except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
            raise self._failed(error) from error

    def load_whole(self, builder: Any) -> Any:
        """As `load`; what `datasets` kept of an earlier call is made anew where it cannot be read."""
        if not Path(builder.cache_dir).exists():
            return self.load(builder)
        try:
            return self._load(builder)
        except Exception as error:  # a damaged file of its cache may raise anything
            say(f"damaged cache, made anew: {builder.cache_dir}: {error}")
            return self.load(builder, download_mode="reuse_cache_if_exists")

    def _load(self, builder: Any, **options: Any) -> Any:
        if isinstance(builder, Csv):
            options |= {"keep_default_na": False, "na_filter": False}
        return datasets.load_dataset(self.name, self.config, streaming=self.streaming, **options)

    def in_order(self, found: Any) -> dict[str, Any]:
        """→ the splits that count, in their order; empty for nothing found."""
        splits = {split: found[split] for split in SPLITS if split in found}
        if found and not splits:
            raise ValueError(f"`dataset_name` {self.name!r} has neither a train nor a validation split.")
        return splits

    def _failed(self, error: Exception) -> ValueError:
        return ValueError(f"`dataset_name` {self.name!r} cannot be loaded: {error}")


# --- a folder here


def _local_files(name: str, builder: Any) -> dict[str, FileList]:
    """→ the files by split, if the data set is a folder here of files that this package reads itself; else nothing."""
    found = {}
    for split, paths in (builder.config.data_files or {}).items():
        kinds = {file_type(Path(path))[0] for path in paths}
        if not Path(name).is_dir() or kinds - {"json", "csv", "parquet"} or len(kinds) != 1 or _has_options(builder):
            return {}
        found[str(split)] = FileList("dataset_name", name, kinds.pop(), [Path(path) for path in paths])
    return found


def _has_options(builder: Any) -> bool:
    """Whether the folder says how its files are read: their separator, their encoding."""
    plain, config = type(builder.config)(), builder.config
    names = {each.name for each in fields(config)} - NEUTRAL_OPTIONS
    return any(getattr(config, name) != getattr(plain, name) for name in names)


def _file_hashes(name: str, builder: Any) -> dict[str, str]:
    """→ file → hash of its bytes, for all files of a folder here and those elsewhere that it names; empty for what is
    no folder, or names what is no file here."""
    if not Path(name).is_dir():
        return {}
    named = [Path(path) for paths in (builder.config.data_files or {}).values() for path in paths]
    if not all(path.is_file() for path in named):
        return {}
    inner = {path for path in Path(name).rglob("*") if path.is_file()}
    return {inside(path, name): content_hash(path) for path in sorted({*inner, *named})}


def _keep_files(source: _Source, builder: Any, found: NamedData, how: tuple[str, str, int]) -> None:
    """The documents of a folder, cached by the content of its files: `datasets` tells them by their names and times,
    and does not see where its own cache is damaged."""

    def make(folder: Path) -> dict[str, dict[str, int]]:
        tallies = {}
        with tempfile.TemporaryDirectory(dir=cache_root(), prefix=MAKING) as work:
            for split, rows in source.in_order(source.load(builder, cache_dir=work)).items():
                _check_rows(rows, how[0])
                tallies[split] = Tally()
                texts = _split_column(rows, how, tallies[split])
                write_documents(folder / f"{split}.arrow", texts, tallies[split])
        if _file_hashes(source.name, builder) != found.files:
            raise ValueError(f"`dataset_name` {source.name!r} was written to while it was read: wait.")
        return {split: asdict(tally) for split, tally in tallies.items()}

    key = ["folder", list(found.files.items()), source.config, *how]
    folder, facts = cached("documents", key, make)
    for split, tally in facts.items():
        found.splits[split] = Dataset.from_file(str(folder / f"{split}.arrow"))
        found.splits[split]._fingerprint = f"{folder.name}-{split}"
        found.tallies.append(Tally(**tally))


# --- rows of `datasets`


def _stream_documents(rows: IterableDataset, how: tuple[str, str, int]) -> IterableDataset:
    _check_rows(rows, how[0])
    options = {"remove_columns": list(next(iter(rows), {})), "features": DOCUMENTS, "fn_kwargs": {"how": how}}
    return rows.map(_split_rows, batched=True, batch_size=32, **options)


def _check_rows(rows: Dataset | IterableDataset, column: str) -> None:
    """Raises `ValueError` if rows have no such column, or no text in it."""
    check_column(column, rows.column_names or list(next(iter(rows), {column: None})))
    if rows.features:
        check_text_type(column, rows.features.arrow_schema.field(column).type)


def _split_rows(batch: dict[str, list[Any]], how: tuple[str, str, int]) -> dict[str, list[str]]:
    return {"text": list(_split_texts(batch[how[0]], how, Tally()))}


def _split_column(rows: Dataset, how: tuple[str, str, int], tally: Tally) -> Iterator[str]:
    for batch in rows.select_columns([how[0]]).iter(batch_size=32):
        yield from _split_texts(batch[how[0]], how, tally)


def _split_texts(texts: list[Any], how: tuple[str, str, int], tally: Tally) -> Iterator[str]:
    column, separator, limit = how
    for text in texts:
        if text is not None and not isinstance(text, str):
            raise ValueError(f"`text_column` must hold text, got {column!r} of type {type(text).__name__}.")
        yield from split_text(pieces(text or ""), separator, limit, tally)
