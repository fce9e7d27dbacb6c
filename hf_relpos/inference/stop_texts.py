"""Where a text ends that a request wants to end before a stop text: transformers ends after it."""

import functools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """→ where the first of the stop texts begins; `None` if there is none."""
    return min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)


def cut_at_stop(text: str, stops: Sequence[str]) -> str:
    """→ the text before the first of the stop texts, or all of it."""
    return text[: find_stop(text, stops)]


def cut_parsed(parse: Callable[..., Any], stops: Callable[[], Sequence[str]]) -> Callable[..., Any]:
    """Makes a parser of messages, whose result begins with the text, leave out what follows a stop text."""

    @functools.wraps(parse)
    def parse_and_cut(*args: Any, **kwargs: Any) -> Any:
        content, *others = parse(*args, **kwargs)
        return cut_at_stop(content, stops()), *others

    return parse_and_cut


class StoppedQueue:
    """The queue of a stream's texts, which ends before the first stop text.

    A text that may be the beginning of a stop text is held back until it is clear what follows.

    Args:
        queue: of pieces of text, of other things, and `None` at the end.
        stops: the stop texts.
        when_stopped: called once when a stop text was found.
    """

    def __init__(self, queue: Any, stops: Sequence[str], when_stopped: Callable[[], Any]) -> None:
        self._queue, self._stops, self._when_stopped = queue, stops, when_stopped
        self._held, self._ready = "", deque()

    async def get(self) -> Any:
        """The next piece, as soon as there is one."""
        while not self._ready:
            self._take(await self._queue.get())
        return self._ready.popleft()

    def get_nowait(self) -> Any:
        """The next piece; raises `asyncio.QueueEmpty` if none is there."""
        while not self._ready:
            self._take(self._queue.get_nowait())
        return self._ready.popleft()

    def _take(self, item: Any) -> None:
        if type(item) is not str:  # the end, an error, a thought, the call of a tool
            self._release(self._held)
            self._held = ""
            self._ready.append(item)
            return
        text = self._held + item
        place = find_stop(text, self._stops)
        if place is not None:
            self._release(text[:place])
            self._when_stopped()
            self._ready.append(None)
            return
        beginnings = (text.endswith(stop[:size]) and size for stop in self._stops for size in range(1, len(stop)))
        free = len(text) - max(beginnings, default=0)
        self._release(text[:free])
        self._held = text[free:]

    def _release(self, text: str) -> None:
        if text:
            self._ready.append(text)
