"""Which fields of OpenAI's requests are served, which change nothing here, and which are refused.

transformers' server takes in all of them and leaves many out of account: whoever sent one would get another answer than
was asked for, without a word.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .token_penalties import PENALTIES


SAMPLING = {"model", "stream", "temperature", "top_p", "seed", "generation_config"}
# for whoever runs the server, or about how an answer is made, not what it says
HARMLESS = {"metadata", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention", "safety_identifier"}
HARMLESS |= {"service_tier", "store", "user"}
NO_TOOLS = {"tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False)}
TOOLS = {"tool_choice": ("auto",), "parallel_tool_calls": (True,)}
STREAM_OPTIONS = ("include_obfuscation", "include_usage")


@dataclass(frozen=True)
class RequestFields:
    """The fields of one kind of request.

    Attributes:
        kind: what it is called.
        text: the field with what the model goes on from.
        served: those whose value is followed.
        harmless: those that are left out of account, whatever they say.
        defaults: those that are not served → the values that ask for nothing; of a dictionary any part of one.
    """

    kind: str
    text: str
    served: frozenset[str]
    harmless: frozenset[str]
    defaults: Mapping[str, tuple[Any, ...]]


# argument of `build_server` → what its handler is asked for
REQUESTS = {
    "completion_handler": RequestFields(
        "completion",
        "prompt",
        frozenset(SAMPLING | {*PENALTIES, "prompt", "max_tokens", "logit_bias", "stop"}),
        frozenset(HARMLESS),
        {
            "best_of": (1,),
            "echo": (False,),
            "logprobs": (False,),
            "n": (1,),
            "suffix": ("",),
        },
    ),
    "chat_handler": RequestFields(
        "chat",
        "messages",
        frozenset(
            SAMPLING
            | {*PENALTIES, "messages", "max_tokens", "max_completion_tokens", "logit_bias", "stop"}
            | {"chat_template_kwargs"}
        ),
        frozenset(HARMLESS | {"prediction"}),
        {
            "audio": (),
            "function_call": ("none", "auto"),
            "functions": ([],),
            "logprobs": (False,),
            "modalities": (["text"],),
            "moderation": (),
            "n": (1,),
            "reasoning_effort": ("none",),
            "response_format": ({"type": "text"},),
            "top_logprobs": (0,),
            "verbosity": ("medium",),
            "web_search_options": (),
        },
    ),
    "response_handler": RequestFields(
        "response",
        "input",
        frozenset(SAMPLING | {"input", "instructions", "max_output_tokens"}),
        frozenset(HARMLESS | {"access_programs", "background_options", "image", "max_tool_calls"}),
        {
            "background": (False,),
            "context_management": ([],),
            "conversation": (),
            "include": ([],),
            "moderation": (),
            "previous_response_id": (),
            "prompt": (),
            "reasoning": ({"effort": "none"},),
            "text": ({"format": {"type": "text"}, "verbosity": "medium"},),
            "top_logprobs": (0,),
            "truncation": ("disabled",),
        },
    ),
}


def served_fields(fields: RequestFields, body: dict[str, Any], has_tools: bool = False) -> dict[str, Any]:
    """→ the fields of a request that are followed; the others ask for nothing, or change nothing here.

    Args:
        fields: of its kind.
        body: the request, without what is null.
        has_tools: whether the model's tokenizer says how tools are called, so that they are served in a chat.

    Raises:
        ValueError: for a field that is not known, or asks for what is not served.
    """
    takes_tools = has_tools and fields.kind != "completion" and bool(body.get("tools"))
    served = fields.served | ({"tools"} if takes_tools else set())
    defaults = fields.defaults
    if fields.kind != "completion":
        defaults = {**defaults, **(TOOLS if takes_tools else NO_TOOLS)}
    for name, value in body.items():
        if name == "stream" and type(value) is not bool:
            raise ValueError(f"`stream` must be true or false, got {shown(value)}.")
        if name == "stream_options":
            _check_stream_options(value)
        elif name in defaults:
            if not any(_asks_for_no_more(value, allowed) for allowed in defaults[name]):
                raise ValueError(_refusal(name, value, defaults[name]))
        elif name not in served | fields.harmless:
            raise ValueError(
                f"`{name[:60]}` is no field of a {fields.kind} request here, which takes {sorted(served)}."
            )
    kept = {name: value for name, value in body.items() if name in served}
    if fields.kind == "response":
        kept.setdefault("stream", False)  # as OpenAI has it; transformers streams
    return kept


def shown(value: Any) -> str:
    """A value in an error, cut off where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]} .."


def _check_stream_options(options: Any) -> None:
    """The last piece of a stream has the usage in any case."""
    if not isinstance(options, dict) or not all(
        value is None or (type(value) is bool and name in STREAM_OPTIONS) for name, value in options.items()
    ):
        raise ValueError(f"`stream_options` must be a dictionary of {[*STREAM_OPTIONS]}, got {shown(options)}.")


def _asks_for_no_more(value: Any, allowed: Any) -> bool:
    """Whether a value is the allowed one, or a part of it if that is a dictionary."""
    if isinstance(value, dict) and isinstance(allowed, dict):
        return all(
            item is None or (name in allowed and _asks_for_no_more(item, allowed[name])) for name, item in value.items()
        )
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed  # True is 1 in Python


def _refusal(name: str, value: Any, allowed: tuple[Any, ...]) -> str:
    choices = " or ".join(["null", *(json.dumps(each) for each in allowed)])
    return f"`{name}` is not served here: it must be left out, or {choices}, got {shown(value)}."
