"""Files of text: which of a folder are read, what they hold, whether two splits share one."""

import bz2
import codecs
import gzip
import hashlib
import io
import lzma
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any


FILE_TYPES = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
ARCHIVES = (".7z", ".br", ".bz", ".lz", ".lz4", ".lzo", ".rar", ".snappy", ".sz", ".tar", ".tbz", ".tgz", ".txz")
ARCHIVES += (".z", ".zip", ".zlib")
LEFT_OUT = re.compile(
    r"^(\.|__)|(^|[._-])checkpoints?($|[._-])", re.IGNORECASE
)  # .git, .ipynb_checkpoints, checkpoint-500
CHUNK = 2**22


@dataclass
class FileList:
    """The files of one split.

    Attributes:
        flag, given: the flag that named them and its value.
        kind: "text", "json", "csv" or "parquet".
        paths: in the order in which they are read.
        skipped: what a folder holds besides, relative to it: names, and folders with "/" at their end.
        others: suffix → how many files that have it are skipped, since others have one of `FILE_TYPES`.
    """

    flag: str
    given: str
    kind: str
    paths: list[Path]
    skipped: list[str] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)


def list_files(flag: str, given: str) -> FileList:
    """The files that a flag names: one file, or those of a folder that are of one kind.

    A file of another suffix than those of `FILE_TYPES` is plain text if it holds that: UTF-8 without NUL bytes. A
    folder is read so where it has no file of these suffixes; where it has one, only those count, so that what a folder
    of texts is read as does not depend on what else lies there.

    In a folder, hidden files and folders, folders of checkpoints, empty files and other files than text are skipped.

    Raises:
        ValueError: for nothing to read, files of several kinds, or compression that cannot be read.
    """
    path = Path(os.path.expanduser(given))  # pathlib fails without a home
    if not os.path.exists(path):
        raise ValueError(f"`{flag}` {given!r} does not exist.")
    files, skipped = _walk(path, flag) if path.is_dir() else ([path], [])
    is_typed = any(file_type(file)[0] for file in files)
    found: list[tuple[Path, str]] = []
    others: Counter[str] = Counter()
    for file in files:
        name = str(file.relative_to(path)) if path.is_dir() else file.name
        kind, compression = file_type(file)
        if kind is None and _is_archive(file, is_typed):
            raise ValueError(_unknown(flag, given, file))
        if kind is None and is_typed:
            skipped.append(name)
            others[suffix_of(name)] += 1
        elif not file.is_file():
            raise ValueError(f"`{flag}`: {str(file)!r} is no regular file.")
        elif not file.stat().st_size:
            skipped.append(f"{name} (empty)")
        elif kind is None and (reason := why_no_text(file)):
            if not path.is_dir():
                raise ValueError(f"`{flag}` must be a file or folder of text, got {given!r}: {reason}.")
            skipped.append(f"{name} (no text)")
        else:
            _check_compression(flag, file, kind, compression)
            if first := _unpacked_beside(file, [each for each, _ in found]):
                skipped.append(f"{name} (the same as {first.name})")
            else:
                found.append((file, kind or "text"))
    if not found:
        left_out = f"; left out: {', '.join(skipped[:5])}" if skipped else ""
        if len(skipped) == len(files) and skipped and all(name.endswith(" (empty)") for name in skipped):
            raise ValueError(f"`{flag}` {given!r} is empty.")
        raise ValueError(f"`{flag}` must be a file or folder of text, got {given!r}, which holds none{left_out}.")
    kinds = sorted({kind for _, kind in found})
    if len(kinds) > 1:
        raise ValueError(f"`{flag}` {given!r} must hold files of one kind, got {kinds}.")
    skipped = [os.fsencode(name).decode("utf-8", "replace") for name in skipped]  # a name may be any bytes
    return FileList(flag, given, kinds[0], [file for file, _ in found], skipped, others)


def _walk(folder: Path, flag: str) -> tuple[list[Path], list[str]]:
    """→ the files of a folder in their order, and what is left out for its name."""

    def fail(error: OSError) -> None:
        raise ValueError(f"`{flag}`: {error.filename!r} cannot be read: {error.strerror}.") from error

    files, skipped = [], []
    for place, folders, names in os.walk(folder, onerror=fail):
        kept = [name for name in folders if not LEFT_OUT.search(name) and not os.path.islink(Path(place, name))]
        skipped += [f"{Path(place, name).relative_to(folder)}/" for name in sorted({*folders} - {*kept})]
        folders[:] = kept
        hidden = [name for name in names if name.startswith((".", "~$"))]  # "~$" begins what an open file leaves
        skipped += [str(Path(place, name).relative_to(folder)) for name in sorted(hidden)]
        files += [Path(place, name) for name in names if name not in hidden]
    return sorted(files), skipped


def _unpacked_beside(file: Path, others: list[Path]) -> Path | None:
    """The one of other files that holds the same text and has the same name but for the compression."""
    for other in others:
        if other.parent == file.parent and _unpacked_name(other) == _unpacked_name(file):
            if _unpacked_hash(other) == _unpacked_hash(file):
                return other
    return None


def _unpacked_name(path: Path) -> str:
    return path.stem if file_type(path)[1] else path.name


def _unpacked_hash(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in read_bytes(path):
        digest.update(chunk)
    return digest.hexdigest()


def file_type(path: Path) -> tuple[str | None, str | None]:
    """→ the kind of a file and how it is compressed, both by its name: "a.jsonl.gz" → "json", ".gz"."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in OPENERS else None
    return FILE_TYPES.get(suffixes[-1]) if suffixes else None, compression


def suffix_of(name: str) -> str:
    """→ the end of a file's name that says what it holds: ".py", ".jsonl.gz"; "no suffix" without one."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    return "".join(suffixes[-2:] if suffixes[-1:] and suffixes[-1] in OPENERS else suffixes[-1:]) or "no suffix"


def _is_archive(path: Path, is_typed: bool) -> bool:
    """Whether a file would have to be unpacked, so that it is not left out in silence."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packs = (*OPENERS, *ARCHIVES)
    if len(suffixes) > 1 and suffixes[-1] in OPENERS and not is_typed:  # it is looked into, but for an archive inside
        return suffixes[-2] in packs
    return bool(suffixes) and suffixes[-1] in packs


def _unknown(flag: str, given: str, path: Path) -> str:
    kinds, compressions = "/".join(FILE_TYPES), "/".join(OPENERS)
    return (
        f"`{flag}`: {str(path)!r} cannot be read: only text and {kinds}, also as {compressions}; unpack it or move it "
        "away."
    )


def _check_compression(flag: str, path: Path, kind: str | None, compression: str | None) -> None:
    if compression and kind == "parquet":
        raise ValueError(f"`{flag}`: {str(path)!r} cannot be read: parquet is compressed inside; unpack it.")
    if compression == ".zst":
        import pyarrow

        if not pyarrow.Codec.is_available("zstd"):
            raise ValueError(
                f"`{flag}`: {str(path)!r} needs a pyarrow with zstd, as `pip install pyarrow` has; or unpack it."
            )


# --- content


def _open_zst(path: Path) -> Any:
    import pyarrow  # takes half a second; zstandard would stop at the end of the first frame

    return pyarrow.input_stream(str(path), compression="zstd")


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".lzma": lzma.open,
    ".zst": _open_zst,
}


def read_bytes(path: Path) -> Iterator[bytes]:
    """What a file holds, unpacked, in chunks.

    Raises:
        ValueError: for a compressed file that is cut or damaged.
    """
    compression = file_type(path)[1]
    try:
        with OPENERS[compression](path) if compression else open(path, "rb") as file:
            while chunk := file.read(CHUNK):
                yield chunk
    except Exception as error:  # each library has its own kinds
        if compression is None:
            raise
        raise ValueError(f"{str(path)!r} is no whole {compression} file: {error}.") from error


def read_text(path: Path) -> Iterator[str]:
    """The text of a file in pieces of a few million characters, without a byte order mark.

    Raises:
        ValueError: for text that is not UTF-8, or as `read_bytes`.
    """
    decoder, offset, is_start = codecs.getincrementaldecoder("utf-8")(), 0, True
    for chunk in chain(read_bytes(path), [b""]):
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(f"{str(path)!r} is not UTF-8 text (near byte {offset + error.start}).") from error
        offset += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if is_start else text
            is_start = False


def why_no_text(path: Path) -> str:
    """→ why a file is no plain text, which is UTF-8 without NUL bytes; empty for one that is.

    It is read to its end, a few megabytes at a time, or to the first byte that is none of text.
    """
    decoder, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in chain(read_bytes(path), [b""]):
        if (place := chunk.find(0)) >= 0:
            return f"it holds a NUL byte (byte {offset + place})"
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            return f"it is not UTF-8 (near byte {offset + error.start})"
        offset += len(chunk)
    return ""


class TextReader(io.RawIOBase):
    """What `read_text` gives as a readable binary file, for parsers; to be wrapped in `io.TextIOWrapper`."""

    def __init__(self, path: Path) -> None:
        self.pieces, self.rest = read_text(path), memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self.rest:
            piece = next(self.pieces, None)
            if piece is None:
                return 0
            self.rest = memoryview(piece.encode())
        size = min(len(buffer), len(self.rest))
        buffer[:size], self.rest = self.rest[:size], self.rest[size:]
        return size


def open_text(path: Path, newline: str = "") -> io.TextIOWrapper:
    """A file of text, unpacked and checked as `read_text` does; lines end as `newline` says for `open`."""
    return io.TextIOWrapper(io.BufferedReader(TextReader(path), CHUNK), encoding="utf-8", newline=newline)


def content_hash(path: Path) -> str:
    """A hash of the bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_apart(first: FileList, second: FileList) -> None:
    """Raises `ValueError`, naming the file, if both splits hold one; links to a file are that file."""
    places = {(path.stat().st_dev, path.stat().st_ino) for path in first.paths}
    for path in second.paths:
        if (path.stat().st_dev, path.stat().st_ino) in places:
            raise ValueError(f"`{second.flag}` must hold other files than `{first.flag}`, got {str(path)!r} in both.")


def inside(path: Path, given: str) -> str:
    """→ the path of a file as seen from the folder that was given, or the name of the file that was; raises
    `ValueError` for a name that is not UTF-8."""
    try:
        os.path.abspath(path).encode()
    except UnicodeEncodeError as error:  # no record can hold it
        raise ValueError(f"the name {str(path)!r} is not UTF-8: rename the file or its folder.") from error
    inside = os.path.relpath(path, Path(given).expanduser())
    return path.name if inside == os.curdir else Path(inside).as_posix()
