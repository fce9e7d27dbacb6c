"""What every room needs: versions and hardware of a run, files written whole, the check of a count.

torch is imported where it is needed only, so that this module costs nothing to import.
"""

import errno
import json
import os
import platform
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


FULL = 2**20  # bytes: with less, what a library could not write had no room
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
# of torch, and of libraries in Rust
WRITE_SIGNS = ("PytorchStreamWriter", "inline_container", "file write", "basic_ios")
WRITE_SIGNS += tuple(f"(os error {number})" for number in WRITE_ERRORS)


def versions() -> dict[str, str]:
    """Versions of what a result depends on, and the commit of the code if it is a git checkout."""
    names = ("hf_relpos", "torch", "transformers", "accelerate", "datasets", "tokenizers")
    found = {"python": platform.python_version()}
    found |= {name: version for name in names if (version := package_version(name)) is not None}
    with suppress(OSError, subprocess.CalledProcessError):
        if _git("--show-prefix") == "hf_relpos/":  # not an environment inside somebody else's repository
            found["commit"] = _git("--short", "HEAD")
    return found


@cache
def package_version(name: str) -> str | None:
    """The version of an installed package, `None` if there is none; looked up once."""
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def _git(*arguments: str) -> str:
    command = ("git", "-C", str(Path(__file__).parent), "rev-parse", *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def hardware() -> dict[str, Any]:
    """What the result was computed on."""
    import torch

    found: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["num_gpus"] = torch.cuda.device_count()
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory_mib() -> float:
    """Peak memory of this process in MiB: the GPU's if there is one, else the resident set."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib / 2**20 if platform.system() == "Darwin" else kib / 2**10


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the file whole or not at all; refuses NaN and infinity, which JSON does not have."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes the file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Writes the file whole or not at all, making its folder where it is missing; an `OSError` names the file."""
    staged = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.write_bytes(content)
        os.replace(staged, path)
    except OSError as error:
        with suppress(OSError):
            staged.unlink()
        raise type(error)(error.errno, error.strerror, error.filename or str(path)) from error


def write_error(error: BaseException) -> BaseException | None:
    """What says that a file could not be written, as on a full disk: the error, one that it came of, or `None`.

    Each library has errors of its own for it, and none names the file.
    """
    seen: BaseException | None = error
    while seen is not None:
        if (isinstance(seen, OSError) and seen.errno in WRITE_ERRORS) or any(sign in str(seen) for sign in WRITE_SIGNS):
            return seen
        seen = seen.__cause__ or seen.__context__
    return None


def is_first_process() -> bool:
    """Whether this process is the one that speaks, of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class CannotWriteError(OSError):
    """A file could not be written, and the message says which, or where."""


@contextmanager
def writing(what: str, place: str | Path) -> Iterator[None]:
    """What cannot be written in the body becomes a `CannotWriteError` that names the place, and says so if the disk is
    full.

    Args:
        what: what to call the place, such as "`output_dir`".
        place: a file or a folder.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, CannotWriteError) or (cause := write_error(error)) is None:
            raise
        place = Path(place)
        reason = str(cause).strip().partition("\n")[0][:300] or type(cause).__name__
        is_full = "No space left" in reason or getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if is_full or disk_usage(place).free < FULL:
            reason = f"the disk is full ({reason})"
        raise CannotWriteError(f"{what} {str(place)!r} cannot be written: {reason}") from error


def disk_usage(place: str | Path) -> Any:
    """`shutil.disk_usage` of where a file or folder lies or would lie."""
    return shutil.disk_usage(_existing(place))


def _existing(place: str | Path) -> Path:
    """The place, or the nearest folder above it that exists."""
    place = Path(place).absolute()
    return next(each for each in (place, *place.parents) if each.exists())


def check_room(name: str, folder: str | Path, num_bytes: int, what: str) -> None:
    """Looks whether a folder, which need not exist, can take files, before the work that they are the result of.

    Args:
        name: what to call the folder.
        folder: the folder.
        num_bytes: how much is going to be written.
        what: what that is.

    Raises:
        ValueError: if there is less room.
        OSError: if nothing can be written there.
    """
    place = _existing(folder)
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise ValueError(
            f"`{name}` {str(folder)!r} has room for {free / 2**20:.1f} MiB, {what} takes {num_bytes / 2**20:.1f}."
        )
    with writing(f"`{name}`", folder), tempfile.TemporaryFile(dir=place):
        pass


def replace_marked(path: Path, begin: str, end: str, text: str) -> None:
    """Writes `text` between the lines `begin` and `end` of a page.

    Raises:
        ValueError: if the page does not hold both, in this order.
    """
    before, found, rest = path.read_text(encoding="utf-8").partition(f"{begin}\n")
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{str(path)!r} must hold the line {begin!r}, and {end!r} after it.")
    write_text(path, f"{before}{found}{text}\n{closed}{after}")


def place_name(place: str | Path) -> str:
    """→ the last part of a path, of the folder that it leads to for "." and "..": a record tells no more of a place."""
    return Path(os.path.abspath(os.path.expanduser(place))).name


def check_at_least_1(name: str, value: float | None) -> None:
    """Raises `ValueError` for a value below 1; `None` is left to its default."""
    if value is not None and value < 1:
        raise ValueError(f"`{name}` must be at least 1, got {value}.")
