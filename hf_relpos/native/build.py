"""Builds the C++ of this folder with the compiler of the machine, once for each version of torch and kind of CPU.

The library lies in `$XDG_CACHE_HOME/hf_relpos`, `~/.cache/hf_relpos` by default, beside a checksum without which it is
not loaded: a file that was cut short would kill the process that loads it.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout


HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno", "-w")
ARCHITECTURE = "-march=native" if platform.machine() in ("x86_64", "AMD64") else "-mcpu=native"
# how long a process waits for another that builds, and for a compiler
SECONDS = 180


class NativeError(Exception):
    """Why there is no native kernel, in one line."""


def cache_folder() -> Path:
    """The folder of what is built."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    if not os.path.isabs(root):
        raise NativeError("there is no home folder to keep it in")
    return Path(root) / "hf_relpos"


def build(folder: Path | None = None, flags: tuple[str, ...] = (ARCHITECTURE,)) -> Path:
    """→ the library, built unless it is in the folder already. Of processes that ask at once, one builds.

    Args:
        folder: where it is kept, `cache_folder()` by default.
        flags: of the compiler, beside those that are always needed.

    Raises:
        NativeError: without a compiler, where it fails, or where the folder cannot be written.
    """
    if sys.platform != "linux":
        raise NativeError(f"it is made for Linux, not for {sys.platform}")
    try:
        folder = cache_folder() if folder is None else folder
        target = folder / f"attention-{_key(flags)}.so"
        if _is_whole(target):
            return target
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock", timeout=SECONDS):
            if not _is_whole(target):
                _compile(target, flags)
    except Timeout as error:
        raise NativeError(f"another process has been building it for {SECONDS} seconds") from error
    except OSError as error:
        raise NativeError(f"it cannot be kept: {error}") from error
    return target


def load_whole(loader: Callable[[Path], Any], folder: Path | None = None) -> Any:
    """→ what `loader` makes of the library; one that does not load is built again, once.

    Raises:
        NativeError: as `build`, or if it does not load either.
    """
    path = build(folder)
    try:
        return loader(path)
    except (OSError, AttributeError):
        _checksum_file(path).unlink(missing_ok=True)
    try:
        return loader(build(folder))
    except (OSError, AttributeError) as error:
        raise NativeError(f"it does not load: {_one_line(str(error))}") from error


def _key(flags: tuple[str, ...]) -> str:
    """What the machine code depends on: the sources, the flags, torch and the instructions of the CPU."""
    sources = sorted(path for path in HERE.iterdir() if path.suffix in (".cpp", ".h"))
    parts = [path.name.encode() + path.read_bytes() for path in sources]
    parts += [repr((FLAGS, flags, torch.__version__, torch.version.git_version, platform.machine())).encode()]
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    fields = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    parts += sorted({line.encode() for line in lines if line.partition("\t")[0].partition(":")[0].strip() in fields})
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _checksum_file(target: Path) -> Path:
    return target.with_suffix(".sha256")


def _is_whole(target: Path) -> bool:
    """Whether the library is there as it was built."""
    try:
        return _checksum_file(target).read_text() == hashlib.sha256(target.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False


def _compiler() -> list[str]:
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    for name in COMPILERS:
        if shutil.which(name):
            return [name]
    raise NativeError("there is no C++ compiler, `g++` or `clang++`")


def _compile(target: Path, flags: tuple[str, ...]) -> None:
    root = Path(torch.__file__).parent
    includes = [f"-I{root / 'include'}", f"-I{root / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as work:
        code, library = Path(work) / "attention.o", Path(work) / "attention.so"
        _run([*_compiler(), *FLAGS, abi, *flags, *includes, "-c", str(HERE / "attention.cpp"), "-o", str(code)])
        # without -fopenmp: the threads are then those of the library that torch has loaded, whatever its name
        _run([*_compiler(), "-shared", str(code), "-o", str(library), f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"])
        checksum = Path(work) / "checksum"
        checksum.write_text(hashlib.sha256(library.read_bytes()).hexdigest())
        os.replace(library, target)
        os.replace(checksum, _checksum_file(target))


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise NativeError(f"{command[0]!r} took more than {SECONDS} seconds") from error
    except OSError as error:
        raise NativeError(f"{command[0]!r} cannot be run: {error}") from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise NativeError(f"{command[0]!r} failed with code {done.returncode}: {_one_line(' '.join(lines[:1]))}")


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
