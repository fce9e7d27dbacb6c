"""What one request may ask of the server of transformers: a cap on its tokens, and an end when its client has gone."""

import asyncio
import contextvars
import functools
import json
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..special_tokens import document_start
from .request_checks import MAX_BODY, MAX_PROMPT_TOKENS, TOKEN_FIELDS, check_body, check_first


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
    """Whether the client of a request is still there, for the threads that work for it, whether it named a number of
    tokens, and its seed."""

    def __init__(self) -> None:
        self.named_tokens, self.seed = True, None
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
    """ASGI middleware: reads the whole request, if it is no longer than `MAX_BODY`, then watches for the end of the
    connection."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages, client, gone = [await receive()], Client(), asyncio.Event()
        while messages[-1].get("more_body"):
            messages.append(await receive())
            if sum(len(message.get("body", b"")) for message in messages) > MAX_BODY:
                await _refuse_size(send)
                return
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


async def _refuse_size(send: Callable) -> None:
    reason = f"the request has more than {MAX_BODY} bytes."
    content = json.dumps({"error": {"message": reason, "type": "invalid_request_error"}}).encode()
    headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 413, "headers": headers})
    await send({"type": "http.response.body", "body": content})


class ClientHasGone(StoppingCriteria):
    """Ends a generation at the next token once its client has gone."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """(B, K) tokens so far → (B,) whether to end."""
        return torch.full((input_ids.shape[0],), self.client.gone.is_set(), dtype=torch.bool, device=input_ids.device)


def limit_handler(handler: Any, cap: int) -> None:
    """Makes a handler of the server refuse requests for more than `cap` new tokens, or whose cost has no limit."""
    check_first(handler, lambda body: check_body(body, cap))
    build = handler._build_generation_config

    @functools.wraps(build)
    def capped(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seed = body.pop("seed", None)  # is set where its text is generated: here it would spoil that of another request
        config = build(body, *args, **kwargs)
        CLIENT.get().seed = seed
        _set_sampling(config, body, is_shared=kwargs.get("use_cb", False))
        if body.get("generation_config") is None:  # a number that was not asked for, but for those that were checked
            config.max_new_tokens = min(config.max_new_tokens or cap, cap)
            CLIENT.get().named_tokens = any(body.get(name) is not None for name in TOKEN_FIELDS)
        return config

    handler._build_generation_config = capped


def _set_sampling(config: GenerationConfig, body: dict[str, Any], is_shared: bool) -> None:
    """Makes a request sample that gives a `temperature` above 0 or a `top_p` below 1; at a `temperature` of 0 it takes
    the likeliest tokens.

    Args:
        config: of the request, changed in place; transformers sets the values, but not that they are used.
        body: of the request.
        is_shared: whether one configuration serves all requests, as in continuous batching.
    """
    options = json.loads(body.get("generation_config") or "{}")
    given = {**options, **body}
    temperature, top_p = given.get("temperature"), given.get("top_p")
    for name in {"temperature", "repetition_penalty"} & set(options):  # 2 is a number too, but for transformers
        setattr(config, name, float(given[name]))
    if "do_sample" in options and body.get("temperature") is None and body.get("top_p") is None:
        return
    if temperature == 0:
        config.do_sample = False
    elif temperature is not None or (top_p is not None and top_p < 1):
        if is_shared and not config.do_sample:
            raise ValueError(
                "`temperature` must be 0, and `top_p` 1, with --continuous-batching: all requests have one setting, "
                f"that of the model, got {temperature!r} and {top_p!r}."
            )
        config.do_sample = True


def start_empty_prompts(handler: Any) -> None:
    """Makes the handler of completions take an empty prompt for the start of a document."""
    handle = handler.handle_request

    @functools.wraps(handle)
    async def started(body: dict[str, Any], request_id: str) -> Any:
        if body.get("prompt") is None:
            raise ValueError("`prompt` must be given: a text to continue, or an empty one to begin a document.")
        if body["prompt"] == "":
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


def pin_model(manager: Any) -> None:
    """Makes the manager of models load the one that is served and no other, by whatever way it is asked for."""
    find = manager.process_model_name

    @functools.wraps(find)
    def find_pinned(name: Any) -> str:
        if manager.force_model is not None and name != manager.force_model:
            raise ValueError(f"`model`: the server is pinned to {manager.force_model!r}, got {str(name)[:200]!r}.")
        return find(name)

    manager.process_model_name = find_pinned


def _follow(manager: Any) -> None:
    stream, generate = manager.generate_streaming, manager.generate_non_streaming
    if hasattr(manager, "async_submit"):
        manager.async_submit = _skip_gone(_seeded(manager.async_submit))
        manager.submit = _seeded(manager.submit)

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


def _seeded(submit: Callable[..., Any]) -> Callable[..., Any]:
    """Sets the seed of a request where its text is generated, one request after the other."""

    def submit_seeded(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        seed = CLIENT.get().seed

        def run(*args: Any, **kwargs: Any) -> Any:
            if seed is not None:
                torch.manual_seed(seed)
            return function(*args, **kwargs)

        return submit(run, *args, **kwargs)

    return submit_seeded


def _skip_gone(submit: Callable[..., Any]) -> Callable[..., Any]:
    """Of requests that wait for their turn, those whose client has gone meanwhile cost nothing."""

    def submit_unless_gone(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        client = CLIENT.get()

        def run(*args: Any, **kwargs: Any) -> Any:
            if client.gone.is_set() and "input_ids" in kwargs:
                return kwargs["input_ids"]
            return function(*args, **kwargs)

        return submit(run, *args, **kwargs)

    return submit_unless_gone


def _fit(model: Any, inputs: Any, generation_config: Any) -> None:
    """Refuses a request without a token or with too many; one that named no number of them gets those that a learned
    table has left."""
    tokens, limit = inputs["input_ids"], getattr(model.config, "max_positions", None)
    count = len(tokens) if isinstance(tokens, list) else tokens.shape[-1]
    if not count:
        raise ValueError("the prompt must have at least one token, got an empty one.")
    most = max(MAX_PROMPT_TOKENS, getattr(model.config, "max_position_embeddings", 0))
    if count > most:
        raise ValueError(f"the prompt has {count} tokens: the server reads at most {most}.")
    if limit is not None and count < limit and not CLIENT.get().named_tokens:
        generation_config.max_new_tokens = min(generation_config.max_new_tokens, limit - count)
