"""Output that cannot be written is no reason to lose a run."""

import functools
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


class SafeStream:
    """stdout or stderr: after the first write that fails nothing is written any more, and `broken` tells whether the
    reader has gone, as with `| head -1`."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.broken, self.silent = stream, False, False

    def write(self, text: str) -> int:
        self._try(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        if self.silent:
            return
        try:
            function(*arguments)
        except OSError as error:
            self.silent, self.broken = True, isinstance(error, BrokenPipeError)
            with suppress(OSError, ValueError, AttributeError):  # what is in its buffer would fail when Python ends
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.stream.fileno())
                os.close(null)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def reader_has_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    return any(getattr(stream, "broken", False) is True for stream in (sys.stdout, sys.stderr))


def safe_output(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: what the function prints may get lost without an error."""

    @functools.wraps(function)
    def wrapped(*arguments: Any, **kwargs: Any) -> Any:
        before = sys.stdout, sys.stderr
        sys.stdout, sys.stderr = map(SafeStream, before)
        try:
            return function(*arguments, **kwargs)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            sys.stdout, sys.stderr = before

    return wrapped
