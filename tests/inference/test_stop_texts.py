"""A text ends before the first stop text, in whatever pieces it arrives."""

import asyncio

import pytest

from hf_relpos.inference.stop_texts import StoppedQueue, cut_at_stop, cut_parsed


def streamed(pieces, stops):
    """→ the texts that come out, the last other thing, and how often the stream was stopped."""
    queue, stopped = asyncio.Queue(), []
    for piece in pieces:
        queue.put_nowait(piece)
    queue.put_nowait(None)

    async def read():
        left, got = StoppedQueue(queue, stops, lambda: stopped.append(1)), []
        got.append(await left.get())
        while got[-1] is not None:
            try:
                got.append(left.get_nowait())
            except asyncio.QueueEmpty:
                got.append(await left.get())
        return got[:-1]

    return asyncio.run(read()), len(stopped)


@pytest.mark.parametrize(
    "text, stops, expected",
    [
        ("one. two. three", ["."], "one"),
        ("one END two", ["END"], "one "),
        ("one EN two", ["END"], "one EN two"),
        ("one END", ["X", "END"], "one "),
        ("one EN", ["END"], "one EN"),
        ("ENEND two", ["END"], "EN"),
        ("ENENEND", ["ENEND"], "EN"),
        ("END", ["END"], ""),
        ("a\nb\n\nc", ["\n\n", "c"], "a\nb"),
    ],
)
def test_a_text_ends_before_a_stop_text(text, stops, expected):
    assert cut_at_stop(text, stops) == expected
    for size in (1, 2, 3, len(text)):
        pieces, stopped = streamed([text[i : i + size] for i in range(0, len(text), size)], stops)
        assert "".join(pieces) == expected and stopped == (text != expected), size
        assert all(pieces)


def test_only_what_may_begin_a_stop_text_is_held_back():
    pieces, _ = streamed(["one ", "two E", "N", "X"], ["END"])
    assert pieces == ["one ", "two ", "ENX"]


def test_what_is_no_text_passes_after_what_was_held_back():
    error = object()
    assert streamed(["one E", error], ["END"]) == (["one ", "E", error], 0)


def test_a_message_that_was_parsed_is_cut():
    parse = cut_parsed(lambda text: (text, "thought", None), lambda: ["."])
    assert parse("one. two") == ("one", "thought", None)
