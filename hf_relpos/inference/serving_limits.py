"""What one request may ask of the server of transformers: a cap on its tokens, and an end when its client has gone."""

import asyncio
import contextvars
import functools
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..special_tokens import document_start
from .request_checks import MAX_BODY, MAX_PROMPT_TOKENS, TOKEN_FIELDS, check_body, check_first, check_logit_bias
from .request_errors import UnknownModelError, error_content
from .request_fields import RequestFields, served_fields, shown
from .stop_texts import StoppedQueue, cut_at_stop
from .token_penalties import PENALTIES, with_penalties


NO_TEMPLATE = "this model has no chat template: ask /v1/completions"
# fields of a request that set what --continuous-batching has once for all of them
NOT_SHARED = (*PENALTIES, "logit_bias", "generation_config")
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


@dataclass(frozen=True)
class ServedModel:
    """What requests are checked by.

    Attributes:
        name: the folder, as it was typed.
        cap: new tokens of a request at most.
        vocab_size: of the model.
        has_chat_template: whether its tokenizer has one, without which nobody can chat.
        has_tools: whether its tokenizer says how tools are called.
    """

    name: str
    cap: int
    vocab_size: int
    has_chat_template: bool
    has_tools: bool


class Client:
    """Whether the client of a request is still there, for the threads that work for it, whether it named a number of
    tokens, its seed, the texts before which its own ends, and its penalties of tokens."""

    def __init__(self) -> None:
        self.named_tokens, self.seed = True, None
        self.stops: Sequence[str] = ()
        self.penalties: dict[str, float] = {}
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
    content = json.dumps(error_content(reason)).encode()
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


def limit_handler(handler: Any, served: ServedModel, fields: RequestFields | None) -> None:
    """Makes a handler of the server refuse requests that ask for what is not served, for more tokens than the cap, or
    whose cost has no limit.

    Args:
        handler: changed in place.
        served: the model.
        fields: those of OpenAI for its requests; `None` if it checks them itself.
    """

    def check(body: dict[str, Any]) -> dict[str, Any]:
        if body.get("model") not in (None, served.name):
            raise UnknownModelError(f"`model`: the server is pinned to {served.name!r}, got {shown(body['model'])}.")
        check_body(body, served.cap)
        body = served_fields(fields, body, served.has_tools) if fields else body
        if fields and fields.text != "prompt" and not served.has_chat_template:
            raise ValueError(NO_TEMPLATE)
        if fields and fields.text not in body:
            raise ValueError(f"`{fields.text}` must be given: what the model goes on from.")
        return body

    check_first(handler, check)
    build = handler._build_generation_config

    @functools.wraps(build)
    def capped(body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        client, is_shared, cap = CLIENT.get(), kwargs.get("use_cb", False), served.cap
        for name in NOT_SHARED if is_shared else ():
            if body.get(name):
                raise ValueError(
                    f"`{name}` is not served with --continuous-batching: all requests have one setting, that of the "
                    f"model, got {shown(body[name])}."
                )
        seed = body.pop("seed", None)  # is set where its text is generated: here it would spoil that of another request
        client.penalties = {name: body.pop(name) for name in PENALTIES if name in body}
        bias = check_logit_bias(body.pop("logit_bias", {}), served.vocab_size)
        config = build(body, *args, **kwargs)
        config.sequence_bias = bias or config.sequence_bias
        client.seed = seed
        client.stops = [config.stop_strings] if isinstance(config.stop_strings, str) else config.stop_strings or []
        if is_shared:  # it would be that of the first request
            config.stop_strings = None
        _set_sampling(config, body, is_shared=is_shared)
        if body.get("generation_config") is None:  # a number that was not asked for, but for those that were checked
            config.max_new_tokens = min(config.max_new_tokens or cap, cap)
            client.named_tokens = any(body.get(name) is not None for name in TOKEN_FIELDS)
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
        if not isinstance(body["prompt"], str):
            raise ValueError(f"`prompt` must be one text, got {shown(body['prompt'])}.")
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
            raise UnknownModelError(f"`model`: the server is pinned to {manager.force_model!r}, got {shown(name)}.")
        return find(name)

    manager.process_model_name = find_pinned


def _follow(manager: Any) -> None:
    stream, generate = manager.generate_streaming, manager.generate_non_streaming
    if hasattr(manager, "async_submit"):
        manager.async_submit = _skip_gone(_seeded(manager.async_submit))
        manager.submit = _seeded(manager.submit)

    def generate_streaming(model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        _fit(model, inputs, *args)
        client = CLIENT.get()
        queue, streamer = stream(model, processor, with_penalties(inputs, client.penalties), *args, **kwargs)
        client.when_gone(streamer.cancel)

        def stop() -> None:
            streamer.cancel()
            _end_by_stop(*args)

        return StoppedQueue(queue, client.stops, stop) if client.stops else queue, streamer

    async def generate_non_streaming(*args: Any, **kwargs: Any) -> Any:
        text, *others = await generate_whole(*args, **kwargs)
        cut = cut_at_stop(text, CLIENT.get().stops)
        if cut != text:
            _end_by_stop(*args[3:])
        return cut, *others

    async def generate_whole(model: Any, processor: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
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
        inputs = with_penalties({**inputs, "stopping_criteria": criteria}, client.penalties)
        return await generate(model, processor, inputs, *args, **kwargs)

    manager.generate_streaming, manager.generate_non_streaming = generate_streaming, generate_non_streaming
    manager.follows_clients = True


def _end_by_stop(generation_config: Any) -> None:
    """The server reads the reason of an end off the number of tokens, which a stop text may end at by chance."""
    generation_config.max_new_tokens = None


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
