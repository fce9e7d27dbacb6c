"""What one request may ask of the server of transformers: a cap on its tokens, and an end when its client has gone."""

import asyncio
import contextvars
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ..special_tokens import document_start


TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
CAP_FLAGS = ("--max_new_tokens", "--max-new-tokens")


def pop_cap(options: list[str]) -> int | None:
    """Takes `--max_new_tokens N` or `--max_new_tokens=N` out of the options; `ValueError` unless N is a number."""
    found = [index for index, word in enumerate(options) if word.partition("=")[0] in CAP_FLAGS]
    if not found:
        return None
    _, equals, value = options.pop(found[0]).partition("=")
    if not equals:
        value = options.pop(found[0]) if found[0] < len(options) else ""
    if len(found) > 1 or not value.isdecimal() or int(value) < 1:
        raise ValueError(f"`max_new_tokens` must be one number of at least 1, got {value!r}.")
    return int(value)


class Client:
    """Whether the client of a request is still there, for the threads that work for it, and whether it named a number
    of tokens."""

    def __init__(self) -> None:
        self.named_tokens = True
        self.gone, self._callbacks = threading.Event(), []

    def when_gone(self, callback: Callable[[], Any]) -> None:
        """Calls it, in the event loop, as soon as the client has gone."""
        self._callbacks.append(callback)
        if self.gone.is_set():
            callback()

    def leave(self) -> None:
        self.gone.set()
        for callback in self._callbacks:
            callback()


CLIENT: contextvars.ContextVar[Client] = contextvars.ContextVar("client")


class FollowClient:
    """ASGI middleware: reads the whole request, then watches for the end of the connection."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, client, gone = [await receive()], Client(), asyncio.Event()
        while messages[-1].get("more_body"):
            messages.append(await receive())
        client.when_gone(gone.set)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            client.leave()

        async def replay() -> dict[str, Any]:
            if messages:
                return messages.pop(0)
            await gone.wait()
            return {"type": "http.disconnect"}

        watcher = asyncio.create_task(watch())
        CLIENT.set(client)
        try:
            await self.app(scope, replay, send)
        finally:
            watcher.cancel()


class ClientHasGone(StoppingCriteria):
    """Ends a generation at the next token once its client has gone."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, K) tokens so far → (B,) whether to end."""
        return torch.full((input_ids.shape[0],), self.client.gone.is_set(), dtype=torch.bool, device=input_ids.device)


def limit_handler(handler: Any, cap: int) -> None:
    """Makes a handler of the server refuse requests for more than `cap` new tokens."""
    build = handler._build_generation_config

    @functools.wraps(build)
    def capped(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        for name in TOKEN_FIELDS:
            if body.get(name) is not None:
                _check_tokens(name, body[name], cap)
        seed = body.get("seed")
        if seed is not None and not (isinstance(seed, int) and 0 <= seed < 2**63):
            raise ValueError(f"`seed` must be a whole number of at least 0, got {seed!r}.")
        config = build(body, *args, **kwargs)
        if body.get("generation_config") is not None:  # whatever fields it may have
            for name in ("max_new_tokens", "max_length"):
                if getattr(config, name, None) is not None:
                    _check_tokens(f"generation_config.{name}", getattr(config, name), cap)
        else:  # a number that was not asked for, but for those checked above
            config.max_new_tokens = min(config.max_new_tokens or cap, cap)
            CLIENT.get().named_tokens = any(body.get(name) is not None for name in TOKEN_FIELDS)
        return config

    handler._build_generation_config = capped


def _check_tokens(name: str, value: Any, cap: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= cap:
        raise ValueError(f"`{name}` must be a number of 1 to {cap} (--max_new_tokens of the server), got {value!r}.")


def start_empty_prompts(handler: Any) -> None:
    """Makes the handler of completions take an empty prompt for the start of a document."""
    handle = handler.handle_request

    @functools.wraps(handle)
    async def started(body: dict[str, Any], request_id: str) -> Any:
        if body.get("prompt", "") == "":
            _, _, tokenizer = handler._resolve_model(dict(body))
            if not tokenizer("")["input_ids"]:
                body["prompt"] = tokenizer.decode(document_start(tokenizer))
        return await handle(body, request_id)

    handler.handle_request = started


def follow_clients(generation_state: Any) -> None:
    """Makes all generation end with its client; a request without any token is refused."""
    get_manager = generation_state.get_manager

    @functools.wraps(get_manager)
    def get(*args: Any, **kwargs: Any) -> Any:
        manager = get_manager(*args, **kwargs)
        if not getattr(manager, "follows_clients", False):
            _follow(manager)
        return manager

    generation_state.get_manager = get


def _follow(manager: Any) -> None:
    stream, generate = manager.generate_streaming, manager.generate_non_streaming

    def generate_streaming(model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _fit(model, inputs, *args)
        queue, streamer = stream(model, processor, inputs, *args, **kwargs)
        CLIENT.get().when_gone(streamer.cancel)
        return queue, streamer

    async def generate_non_streaming(model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _fit(model, inputs, *args)
        client, batching = CLIENT.get(), getattr(manager, "_cb", None)
        if batching is not None:
            task = asyncio.ensure_future(generate(model, processor, inputs, *args, **kwargs))
            client.when_gone(lambda: batching.cancel_request(kwargs["request_id"]))
            client.when_gone(task.cancel)
            try:
                return await task
            except asyncio.CancelledError:
                if not client.gone.is_set():
                    raise
                return "", len(inputs["input_ids"]), []
        criteria = StoppingCriteriaList([ClientHasGone(client)])
        return await generate(model, processor, {**inputs, "stopping_criteria": criteria}, *args, **kwargs)

    manager.generate_streaming, manager.generate_non_streaming = generate_streaming, generate_non_streaming
    manager.follows_clients = True


def _fit(model: Any, inputs: Any, generation_config: Any) -> None:
    """Refuses a request without a token; one that named no number of them gets those that a learned table has left."""
    tokens, limit = inputs["input_ids"], getattr(model.config, "max_positions", None)
    count = len(tokens) if isinstance(tokens, list) else tokens.shape[-1]
    if not count:
        raise ValueError("the prompt must have at least one token, got an empty one.")
    if limit is not None and count < limit and not CLIENT.get().named_tokens:
        generation_config.max_new_tokens = min(generation_config.max_new_tokens, limit - count)
