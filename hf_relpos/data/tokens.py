"""The tokenizer, and documents → tokens.

Tokenised documents and trained tokenizers are cached in the cache of `datasets`, named by a hash of all that they
depend on.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from datasets import Dataset, IterableDataset
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..model_loading import check_vocab_size, load_tokenizer_of
from ..special_tokens import END, PAD, SPECIAL_TOKENS, START, document_end, document_start
from .arguments import TextArguments
from .cache import cached, cached_rows, digest, say
from .corpus import Corpus


LONG_WORD = 1000  # characters


class PoorTextError(ValueError):
    """A text has too few different words for a vocabulary.

    Attributes:
        most: entries that it gives.
    """

    def __init__(self, message: str, most: int) -> None:
        super().__init__(message)
        self.most = most


def load_tokenizer(args: TextArguments, corpus: Corpus, vocab_size: int | None) -> PreTrainedTokenizerFast:
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
    return load_named_tokenizer(args.tokenizer_name, vocab_size)


def load_named_tokenizer(name: str, vocab_size: int | None) -> PreTrainedTokenizerFast:
    """The tokenizer of that name, of `vocab_size` entries if that is given; raises `ValueError` as `load_tokenizer`."""
    tokenizer = load_tokenizer_of(name, f"`tokenizer_name` {name!r} cannot be loaded")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"`tokenizer_name` {name!r} has no end-of-sequence token to separate documents.")
    check_vocab_size(tokenizer, vocab_size or len(tokenizer))
    return tokenizer


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` entries, its special tokens among them, from the training split; it puts its
    beginning-of-sequence token before each text."""
    if vocab_size < 259:
        raise ValueError(f"`vocab_size` must be at least 259 (256 bytes and 3 special tokens), got {vocab_size}.")
    if "train" not in corpus.splits:
        raise ValueError("`train_file` or `tokenizer_name` is needed: there is no text to train a tokenizer on.")
    if not corpus.fingerprint:
        return _train_tokenizer(corpus, vocab_size)
    parts = [corpus.fingerprint, vocab_size, SPECIAL_TOKENS, tokenizers.__version__]
    folder, _ = cached("tokenizer", parts, lambda folder: _save(_train_tokenizer(corpus, vocab_size), folder), True)
    return AutoTokenizer.from_pretrained(folder)


def _save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    tokenizer.save_pretrained(folder)


def _cut_words(text: str) -> str:
    """→ the text with spaces in words of more than 1000 characters: the trainer's time grows with their square."""
    if max(map(len, text.split()), default=0) <= LONG_WORD:
        return text
    return re.sub(r"\S+", lambda word: " ".join(re.findall(f".{{1,{LONG_WORD}}}", word[0])), text)


def _train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, START],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    train = corpus.splits["train"]
    train = train.take(100_000) if isinstance(train, IterableDataset) else train
    backend.train_from_iterator((map(_cut_words, batch["text"]) for batch in train.iter(batch_size=100)), trainer)
    if (most := backend.get_vocab_size()) != vocab_size:
        raise PoorTextError(
            f"`vocab_size` {vocab_size} is more than this corpus gives: the words of {corpus.name!r} make {most} "
            f"entries; more text helps, or --vocab_size {most}.",
            most,
        )
    start = (START, backend.token_to_id(START))
    backend.post_processor = processors.TemplateProcessing(single=f"{START} $A", special_tokens=[start])
    return PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS)


def tokenize(
    documents: Dataset | IterableDataset, tokenizer: Any, fingerprint: str = "", num_workers: int | None = None
) -> Dataset | IterableDataset:
    """Documents → one row of `input_ids` each, from `document_start` to `document_end`, if there is one.

    Control tokens that stand in a document are encoded as the text that they are; a line says that there are some.

    Args:
        documents: column "text".
        tokenizer: any tokenizer of transformers.
        fingerprint: of the corpus and split; if it is given, the result is cached.
        num_workers: processes; the tokenizer itself uses all cores in one.

    Raises:
        ValueError: if the tokenizer knows a control token in a document as nothing but that token.
    """
    encoder = _Encoder(tokenizer)
    if isinstance(documents, IterableDataset):
        encoder.says = True
        return documents.map(encoder, batched=True, batch_size=100, remove_columns=["text"])
    options = {"batched": True, "batch_size": 100, "num_proc": num_workers}
    options |= {"remove_columns": documents.column_names}
    if not fingerprint:
        _say_control_tokens(encoder.count(batch["text"] for batch in documents.iter(batch_size=1000)))
        return documents.map(encoder, desc="Tokenising", **options)
    parts = [fingerprint, _tokenizer_hash(tokenizer), encoder.start, tokenizers.__version__]

    def make(folder: Path) -> int:
        file = str(folder / "tokens.arrow")
        documents.map(encoder, new_fingerprint=digest(*parts)[:32], cache_file_name=file, desc="Tokenising", **options)
        return encoder.count(batch["text"] for batch in documents.iter(batch_size=1000))

    rows, num_found = cached_rows("tokens", parts, make)
    _say_control_tokens(num_found)
    return rows


class _Encoder:
    """Documents → tokens, for `map`.

    Args:
        tokenizer: `document_start` and `document_end` say which tokens of it begin and end every document.

    Attributes:
        says: whether a line is due when the first control token is met.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.says = tokenizer, False
        self.start = document_start(tokenizer)
        end = document_end(tokenizer)
        self.end = [] if end is None else [end]
        names = sorted(map(str, getattr(tokenizer, "all_special_tokens", [])), key=len, reverse=True)
        names = [name for name in names if name]
        self.control = re.compile("|".join(map(re.escape, names))) if names else None
        unknown = getattr(tokenizer, "unk_token_id", None)
        self.control_ids = {*getattr(tokenizer, "all_special_ids", [])} - {unknown}

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        options = {"add_special_tokens": False, "split_special_tokens": True}
        rows = self.tokenizer(batch["text"], **options, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(batch["text"], rows):
            if self.control and (found := self.control.search(text)):
                if not self.control_ids.isdisjoint(ids):
                    raise ValueError(
                        f"the text holds {found[0]!r}, which this tokenizer encodes as a control token only: "
                        "take it out, or give it as `document_separator`."
                    )
                if self.says:
                    self.says = False
                    say(f"control tokens in the text are encoded as plain text, {found[0]!r} first")
        return {"input_ids": [self.start + ids + self.end for ids in rows]}

    def count(self, batches: Iterable[list[str]]) -> int:
        """How many control tokens stand in texts."""
        if self.control is None:
            return 0
        return sum(len(self.control.findall(text)) for texts in batches for text in texts)


def _say_control_tokens(count: int) -> None:
    if count:
        say(f"control tokens in the text, encoded as plain text: {count:,}")


def tokenize_split(corpus: Corpus, split: str, tokenizer: Any, args: TextArguments) -> Dataset | IterableDataset:
    """`tokenize` of one split of a corpus, cached by what the corpus holds."""
    fingerprint = f"{corpus.fingerprint}-{split}"
    return tokenize(corpus.splits[split], tokenizer, fingerprint, args.preprocessing_num_workers)


class TokenizedDocuments:
    """Documents as arrays of tokens: read from disk one at a time, as often as they are asked for.

    Args:
        tokenized: rows of `input_ids`.
        joined: whether the documents are read as one text, in pieces of 2^20 tokens.
        end: the token that ends each row; a document that is read alone is scored without it, as by harnesses.
        numbers: for each row, the document that it is a piece of; by default each is a document.

    Attributes:
        numbers: the same; `None` where all rows are joined.
    """

    piece_length = 2**20

    def __init__(
        self,
        tokenized: Dataset | IterableDataset,
        joined: bool = False,
        end: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        self.tokenized, self.joined, self.end = tokenized, joined, end
        self.numbers = None if joined else numbers

    def __iter__(self) -> Iterator[np.ndarray]:
        documents = (np.asarray(row["input_ids"], dtype=np.int32) for row in self.tokenized)
        if self.joined:
            return self._join(documents)
        return (document if self.end is None else document[:-1] for document in documents)

    def _join(self, documents: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        rest = np.empty(0, dtype=np.int32)
        for document in documents:
            rest = np.concatenate((rest, document))
            while len(rest) >= self.piece_length:
                yield rest[: self.piece_length]
                rest = rest[self.piece_length :]
        if len(rest):
            yield rest


def evaluation_documents(
    corpus: Corpus, args: TextArguments, tokenizer: Any, split: str | None = None
) -> tuple[str, TokenizedDocuments]:
    """→ the split's name and its documents; all as one text with `args.cross_document_attention`.

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
    rows = tokenize_split(corpus, split, tokenizer, args)
    documents = corpus.splits[split]
    numbers = documents["document"][:] if "document" in (documents.column_names or ()) else None
    return split, TokenizedDocuments(rows, args.cross_document_attention, document_end(tokenizer), numbers)


def _tokenizer_hash(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    return digest(content, document_end(tokenizer))
