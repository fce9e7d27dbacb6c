"""The cache of documents, tokens, blocks and trained tokenizers: folders named by a hash of all that they depend on.

Each folder holds `entry.txt`: checksums of its files, by which a damaged one is found and made anew, and facts.
"""

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..environment import is_first_process, writing


CACHE_VERSION = 1  # raise it when what is hashed changes its meaning; fingerprints of corpora change with it
CONTENT_VERSION = 4  # raise it when data/ changes what it makes and keeps
ENTRY = "entry.txt"
MAKING = "making-"  # begins the names of folders that are not whole


def say(line: str) -> None:
    """Prints a line to stderr, in the first process of a run only."""
    if is_first_process():
        print(line, file=sys.stderr)


def digest(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps([CACHE_VERSION, *parts], sort_keys=True).encode()).hexdigest()


def cache_root() -> Path:
    """The folder of this package in the cache of `datasets`."""
    import datasets  # takes a second, and hashes alone do not need it

    root = Path(datasets.config.HF_DATASETS_CACHE) / "hf_relpos"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a user without a home, or with one that is read-only
        raise OSError(
            f"the cache {str(root)!r} cannot be made ({error.strerror}): HF_DATASETS_CACHE=FOLDER names another place."
        ) from error
    return root


def cached(kind: str, parts: list[Any], make: Callable[[Path], Any], is_read_whole: bool = False) -> tuple[Path, Any]:
    """An entry of the cache, made if it is missing or damaged.

    Args:
        kind: "documents", "tokens", "blocks" or "tokenizer".
        parts: JSON values, all that the entry depends on.
        make: puts files into a folder and returns facts, a JSON value. Other processes may make the same at once.
        is_read_whole: whether who reads the folder takes any file that lies there, so that a strange one is damage.

    Returns:
        the folder, and the facts.

    Raises:
        OSError: if the cache cannot be written, naming it; nothing is left there then.
    """
    target = cache_root() / f"{kind}-{digest(CONTENT_VERSION, kind, *parts)[:24]}"
    for _ in range(3):  # another process that found it damaged may have taken away what this one wrote
        if os.path.lexists(target):
            try:
                return target, _checked_facts(target, is_read_whole)
            except (OSError, ValueError) as error:
                say(f"damaged cache, made anew: {target}: {error}")
                with writing("the cache", target.parent):
                    _discard(target)
        with writing("the cache", target.parent):
            _make(target, make)
    return target, _checked_facts(target, is_read_whole)


def _make(target: Path, make: Callable[[Path], Any]) -> None:
    """Makes an entry in a folder of its own and puts it into its place, whole."""
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=MAKING) as name:
        folder = Path(name) / "entry"
        folder.mkdir()
        facts = make(folder)
        checksums = {path.name: _checksum(path) for path in sorted(folder.iterdir())}
        content = json.dumps({"checksums": checksums, "facts": facts})
        (folder / ENTRY).write_text(f"{digest(content)}\n{content}", encoding="utf-8")
        try:
            folder.rename(target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise


def _discard(target: Path) -> None:
    """Takes a damaged entry away, whatever it has become; another process may do the same at once."""
    with tempfile.TemporaryDirectory(dir=cache_root(), prefix=MAKING, ignore_cleanup_errors=True) as aside:
        with suppress(FileNotFoundError):
            target.rename(Path(aside) / "damaged")  # a link itself, not what it leads to


def cached_rows(kind: str, parts: list[Any], make: Callable[[Path], Any]) -> tuple[Any, Any]:
    """As `cached`, of Arrow files, in the order of their names → a `datasets.Dataset` and the facts."""
    import datasets

    folder, facts = cached(kind, parts, make)
    names = sorted(_read_entry(folder)["checksums"])
    rows = datasets.concatenate_datasets([datasets.Dataset.from_file(str(folder / name)) for name in names])
    rows._fingerprint = folder.name  # names the content, by which what is made of it is cached
    return rows, facts


def _checked_facts(folder: Path, is_read_whole: bool = False) -> Any:
    """→ the facts; raises `ValueError` for a file that is not as it was written, or `OSError`."""
    entry = _read_entry(folder)
    for name, checksum in entry["checksums"].items():
        if _checksum(folder / name) != checksum:
            raise ValueError(f"{name} is not as it was written")
    if is_read_whole:
        strange = sorted({path.name for path in folder.iterdir()} - {ENTRY, *entry["checksums"]})
        if strange:
            raise ValueError(f"{strange[0]} was not written there")
    return entry["facts"]


def _read_entry(folder: Path) -> dict[str, Any]:
    """→ checksums and facts, whose own checksum is the first line."""
    _check_is_file(folder / ENTRY)
    checksum, _, content = (folder / ENTRY).read_text(encoding="utf-8", errors="replace").partition("\n")
    if digest(content) != checksum:
        raise ValueError(f"{ENTRY} is not as it was written")
    return json.loads(content)


def _checksum(path: Path) -> str:
    import xxhash  # which datasets needs; as fast as the file is read

    _check_is_file(path)
    total = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while chunk := file.read(2**22):
            total.update(chunk)
    return total.hexdigest()


def _check_is_file(path: Path) -> None:
    """Raises `ValueError` for a folder, and for a pipe, which would be read for ever."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path.name} is no file")
