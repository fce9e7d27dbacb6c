"""What the processes of a run owe each other: one owner for each folder, and none that outlives its parent."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout


LOCK = ".lock"
LONGEST_START = 120.0  # seconds
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class InUseError(ValueError):
    """Another process that lives holds the folder."""


@contextmanager
def only_owner(folder: str | Path, name: str = "output_dir", seconds: float = 1.0) -> Iterator[None]:
    """Holds a folder while the body runs, so that one process at a time works in it. Makes the folder, and removes it
    again if the body leaves nothing there.

    The lock is `flock` on the empty file `.lock`, which stays in the folder. The kernel drops the lock with its
    process, however that ends: a file that was left behind says nothing, and no number of a process can be out of date
    or another's. The same thread may hold a folder twice. Processes that it forks do not hold it.

    Machines that share the folder exclude each other where their file system passes `flock` on, as NFS does unless it
    is mounted with `nolock` or `local_lock`; the locks of a machine that died are free when the server's lease is over.
    Where a file system has no `flock` at all, `filelock` warns and puts a file with machine and process in its place.

    Args:
        folder: the folder.
        name: what the message calls it.
        seconds: how long to wait for another process; below 0 for ever.

    Raises:
        InUseError: if another process holds it.
        OSError: if the folder cannot be written, naming it.
    """
    folder = Path(folder)
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = FileLock(folder / LOCK, is_singleton=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        open(folder / LOCK, "ab").close()  # filelock would wait for a folder that takes no file
        lock.acquire(timeout=seconds)
    except Timeout as error:
        raise InUseError(
            f"`{name}` {str(folder)!r} is in use by another process: wait until it ends, or choose another."
        ) from error
    except OSError as error:
        raise OSError(f"`{name}` {str(folder)!r} cannot be written: {error}") from error
    try:
        yield
    finally:
        if created and [path.name for path in folder.glob("*")] == [LOCK]:
            (folder / LOCK).unlink()
            with suppress(OSError):
                for path in created:
                    path.rmdir()
        lock.release()


def is_held(folder: str | Path) -> bool:
    """Whether another process holds the folder; changes nothing in it."""
    if not (Path(folder) / LOCK).exists():
        return False
    try:
        with only_owner(folder, seconds=0):
            return False
    except InUseError:
        return True


def seconds_of_start() -> float:
    """How long this process has been running, as `time` counts it, when all that it did was to start; 0 where the
    system does not tell, or after more than two minutes, in which it did something else."""
    with suppress(OSError, AttributeError, ValueError, IndexError):
        begun = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
        seconds = time.clock_gettime(time.CLOCK_BOOTTIME) - begun
        return seconds if 0 <= seconds < LONGEST_START else 0.0
    return 0.0


def end_with_parent(parent: int | None = None) -> None:
    """From now on this process is killed when the one that started it ends, however that ends, and so are the processes
    that it forks.

    On Linux the kernel does so at once (`PR_SET_PDEATHSIG`). Elsewhere, and in forked processes, a thread looks every
    half second whether the parent lives: the kernel's signal would come with the end of the thread that forked.

    Args:
        parent: the number of the process that started this one, if that is known: it may have ended already.
    """
    parent = parent or os.getppid()
    os.register_at_fork(after_in_child=lambda: _watch(os.getppid()))
    if sys.platform != "linux":
        _watch(parent)
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def _watch(parent: int) -> None:
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
