"""The text of a comparison: cut into training, validation and test documents, which are written down once."""

import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..data.arguments import TextArguments
from ..data.cache import say
from ..data.corpus import load_corpus
from ..data.files import content_hash
from ..environment import write_text
from ..file_reading import read_json


SPLITS = ("train", "validation", "test")
SOURCE = "source.json"
FEW_DOCUMENTS = 40  # with fewer, each is cut into the three splits itself
SHARE = 0.1  # of the text, that validation and test have each
TEST_PIECES = 20  # of the test text, where there are few documents
MAX_CHARACTERS = 2**28  # 256 MB; what follows is not read


def prepare_text(text: str | None, folder: Path, run_length: int) -> dict[str, Path]:
    """Writes train.jsonl, validation.jsonl and test.jsonl to a folder of the text's name, unless it has them already.

    Those of another text are replaced as long as nothing was trained on them.

    Whole documents are dealt out to the splits; where there are fewer than 40, each is cut into a beginning to train
    on, a part to validate on and an end to test on, which is cut again, so that intervals over documents can be had.

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
        corpus = load_corpus(TextArguments(validation_file=text))  # which is not split further
    except ValueError as error:
        raise ValueError(str(error).replace("`validation_file`", "`text`")) from error
    paths = {split: folder / corpus.name / f"{split}.jsonl" for split in SPLITS}
    source = {"name": corpus.name, "fingerprint": corpus.fingerprint, "run_length": run_length}
    if (folder / SOURCE).is_file():
        before = read_json(folder / SOURCE)
        hashes = before.pop("files", {})
        damaged = next((path for path in paths.values() if _hash(path) != hashes.get(path.name, _hash(path))), None)
        if before == source and damaged is None:
            return paths
        if (folder.parent / "runs").exists():
            if before == source:
                raise ValueError(f"{str(damaged)!r} is not as it was written: choose another `output_dir`.")
            raise ValueError(f"{str(folder)!r} holds the text of another comparison: choose another `output_dir`.")
        (folder / SOURCE).unlink()
    documents = _read(document["text"] for split in corpus.splits.values() for document in split)
    splits = _deal(documents) if len(documents) >= FEW_DOCUMENTS else _cut_each(documents, run_length)
    if not all(splits.values()):
        raise ValueError(f"`text` {text!r} is too short to be cut into text to train, to validate and to test on.")
    for split, path in paths.items():
        write_text(path, "".join(json.dumps({"text": each}, ensure_ascii=False) + "\n" for each in splits[split]))
    files = {path.name: _hash(path) for path in paths.values()}
    write_text(folder / SOURCE, json.dumps(source | {"files": files}))
    return paths


def _hash(path: Path) -> str | None:
    return content_hash(path) if path.is_file() else None


def _read(documents: Iterator[str]) -> list[str]:
    """→ the documents, up to 256 MB of them."""
    found, size = [], 0
    for document in documents:
        size += len(document)
        if size > MAX_CHARACTERS:
            say(f"only the first {len(found):,} documents are read, {MAX_CHARACTERS >> 20} MB")
            break
        found.append(document)
    return found


def _deal(documents: Sequence[str]) -> dict[str, list[str]]:
    """Whole documents, in an order that depends on nothing but themselves."""
    order = sorted(documents, key=lambda text: (zlib.crc32(text.encode()), text))
    total, splits, size = sum(map(len, order)), {split: [] for split in SPLITS}, 0
    for document in order:
        split = "test" if size < SHARE * total else "validation" if size < 2 * SHARE * total else "train"
        splits[split].append(document)
        size += len(document)
    return splits


def _cut_each(documents: Sequence[str], run_length: int) -> dict[str, list[str]]:
    """The beginning of each document, the part after it, and its end in pieces."""
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    total = sum(map(len, documents))
    for document in documents:
        first, second = (_line_end(document, int(share * len(document))) for share in (1 - 2 * SHARE, 1 - SHARE))
        splits["train"].append(document[:first])
        splits["validation"].append(document[first:second])
        rest = document[second:]
        # a token has hardly ever more than six characters: a piece holds a window
        fitting = len(rest) // (6 * run_length + 1)
        count = max(1, min(fitting, round(TEST_PIECES * len(document) / total)))
        ends = [0, *(_line_end(rest, len(rest) * piece // count) for piece in range(1, count)), len(rest)]
        splits["test"] += [rest[start:end] for start, end in zip(ends, ends[1:])]
    return {split: [text for text in texts if text.strip()] for split, texts in splits.items()}


def _line_end(text: str, place: int) -> int:
    """→ the end of the line, or of the word, that a place lies in; the place itself in text without either."""
    for mark in ("\n", " "):
        found = text.find(mark, place)
        if 0 <= found - place < max(200, len(text) // 50):
            return found + 1
    return place
