"""The text of a comparison: cut into training, validation and test documents, which are written down once."""

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..data.arguments import TextArguments
from ..data.cache import say
from ..data.corpus import load_corpus
from ..data.files import content_hash
from ..environment import write_text
from ..file_reading import read_json
from .comparison_plan import FEWEST_WINDOWS


SPLITS = ("train", "validation", "test")
SOURCE = "source.json"
FEW_DOCUMENTS = 12  # that can be held out whole; with fewer, each is cut into the three splits itself
FEWEST_TEST = 6  # documents of the test text that are held out whole
SHARE = 0.1  # of the text, that validation and test have each
TOKEN_CHARACTERS = 4  # about so many make a token
MAX_CHARACTERS = 2**28  # 256 MB; what follows is not read


def prepare_text(text: str | None, folder: Path, run_length: int) -> dict[str, Path]:
    """Writes train.jsonl, validation.jsonl and test.jsonl to a folder of the text's name, unless it has them already.

    Those of another text are replaced as long as nothing was trained on them.

    Whole documents are dealt out to the splits; where fewer than 12 are long enough to be held out, each is cut into a
    beginning to train on, a part to validate on and an end to test on, see `num_cut`.

    Args:
        text: a file or folder of text, as --train_file takes it; the built-in corpus by default.
        folder: where that folder goes; the runs on the files are in `runs` beside it.
        run_length: tokens that a test document should have.

    Returns:
        split → file.

    Raises:
        ValueError: if there are runs on another text, if a split would be empty, or as `load_corpus`.
    """
    try:
        corpus = load_corpus(TextArguments(validation_file=text), is_unsplit=True)
    except ValueError as error:
        raise ValueError(str(error).replace("`validation_file`", "`text`")) from error
    paths = {split: folder / corpus.name / f"{split}.jsonl" for split in SPLITS}
    source = {"name": corpus.name, "fingerprint": corpus.fingerprint, "run_length": run_length}
    if (folder / SOURCE).is_file():
        before = read_json(folder / SOURCE)
        if before.pop("num_cut", None) is None:  # of an older version, which dealt documents out in another way
            before = {"files": {}}
        hashes = before.pop("files", {})
        damaged = next((path for path in paths.values() if _hash(path) != hashes.get(path.name, _hash(path))), None)
        if before == source and damaged is None:
            return paths
        if (folder.parent / "runs").exists():
            if before == source:
                raise ValueError(f"{str(damaged)!r} is not as it was written: choose another `output_dir`.")
            raise ValueError(f"{str(folder)!r} holds the text of another comparison: choose another `output_dir`.")
        (folder / SOURCE).unlink()
    documents = _read(row for split in corpus.splits.values() for row in split)
    is_cut = _must_be_cut(documents, run_length)
    splits = _cut_each(documents) if is_cut else _deal(documents, run_length)
    if not all(splits.values()):
        raise ValueError(f"`text` {text!r} is too short to be cut into text to train, to validate and to test on.")
    for split, path in paths.items():
        write_text(path, "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in splits[split]))
    files = {path.name: _hash(path) for path in paths.values()}
    write_text(folder / SOURCE, json.dumps(source | {"files": files, "num_cut": len(documents) * is_cut}))
    return paths


def num_cut(folder: Path) -> int:
    """How many documents `prepare_text` cut, so that the test text is their ends; 0 where whole ones are held out."""
    return read_json(folder / SOURCE)["num_cut"]


def _hash(path: Path) -> str | None:
    return content_hash(path) if path.is_file() else None


def _read(rows: Iterator[dict[str, Any]]) -> list[str]:
    """→ the documents, put together where they are in pieces, up to 256 MB of them."""
    found: list[list[str]] = []
    size, last = 0, None
    for index, row in enumerate(rows):
        size += len(row["text"])
        if size > MAX_CHARACTERS:
            say(f"only the first {len(found):,} documents are read, {MAX_CHARACTERS >> 20} MB")
            break
        number = row.get("document", index)
        if number != last:
            found.append([])
        found[-1].append(row["text"])
        last = number
    return ["".join(pieces) for pieces in found]


def _fit(documents: Sequence[str], run_length: int) -> list[str]:
    """→ those that can be held out whole: long enough to be read at the run length, and not most of the text."""
    most = 2 * SHARE * sum(map(len, documents))
    return [text for text in documents if TOKEN_CHARACTERS * run_length <= len(text) <= most]


def _must_be_cut(documents: Sequence[str], run_length: int) -> bool:
    """Whether too few documents can be held out whole, and cutting each of them would give a test text instead."""
    if len(_fit(documents, run_length)) >= FEW_DOCUMENTS:
        return False
    served = sum(int(SHARE * len(text)) // (TOKEN_CHARACTERS * run_length) for text in documents)
    return len(documents) < FEW_DOCUMENTS or served >= FEWEST_WINDOWS


def _deal(documents: Sequence[str], run_length: int) -> dict[str, list[str]]:
    """Whole documents, in an order that depends on nothing but themselves.

    The test text has a tenth of all, and six documents, or a quarter of those that can be read at the run length.
    """
    copies = Counter(documents)  # which go together
    order = sorted(copies, key=lambda text: (zlib.crc32(text.encode()), text))
    total, fitting = sum(map(len, documents)), {*_fit(documents, run_length)}
    candidates = [text for text in order if text in fitting] if len(fitting) >= FEW_DOCUMENTS else order
    test: list[str] = []
    size = windows = 0
    for document in candidates[: len(candidates) // 4]:
        if size < SHARE * total or len(test) < FEWEST_TEST or windows < FEWEST_WINDOWS:
            test.append(document)
            size += copies[document] * len(document)
            windows += len(document) // (TOKEN_CHARACTERS * run_length)
    validation, tested, size = [], {*test}, 0
    for document in dict.fromkeys([*candidates[len(test) :][:1], *order]):  # one at least that can be read
        if document in tested or len(document) > 2 * SHARE * total:
            continue
        if not validation or (size < SHARE * total and len(validation) < len(order) // 6):
            validation.append(document)
            size += copies[document] * len(document)
    taken = {*tested, *validation}
    splits = {"train": [text for text in order if text not in taken], "validation": validation, "test": test}
    return {split: [text for text in texts for _ in range(copies[text])] for split, texts in splits.items()}


def _cut_each(documents: Sequence[str]) -> dict[str, list[str]]:
    """The beginning of each document, the part after it, and its end."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in documents:
        first, second = (_line_end(document, int(share * len(document))) for share in (1 - 2 * SHARE, 1 - SHARE))
        for split, text in zip(SPLITS, (document[:first], document[first:second], document[second:])):
            splits[split].append(text)
    return {split: [text for text in texts if text.strip()] for split, texts in splits.items()}


def _line_end(text: str, place: int) -> int:
    """→ the end of the line, or of the word, that a place lies in; the place itself in text without either."""
    for mark in ("\n", " "):
        found = text.find(mark, place)
        if 0 <= found - place < max(200, len(text) // 50):
            return found + 1
    return place
