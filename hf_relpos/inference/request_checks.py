"""What a request to the server may hold: checked before anything is computed for it, since one that costs without
limit would hold up all others."""

import inspect
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from .request_errors import errors_in_form
from .request_fields import shown
from .token_penalties import PENALTIES


TOKEN_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
MAX_PROMPT_TOKENS = 8192  # of a text that a model reads at once, unless it is made for longer ones
MAX_CHARACTERS = 32 * MAX_PROMPT_TOKENS  # of a text that is cut into tokens at all, which takes long and much memory
MAX_BODY = 8 * MAX_CHARACTERS  # bytes of a request: JSON may write a character as "\u0000"
MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
# fields of GenerationConfig that a request may set → the least and the most; others change what is computed
GENERATION_FIELDS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, math.inf),
    "max_length": (1, math.inf),
    "min_new_tokens": (0, math.inf),
    "num_beams": (1, 8),
    "temperature": (0.01, 100),
    "top_k": (0, 2**31),
    "top_p": (1e-6, 1),
    "min_p": (0, 1),
    "typical_p": (1e-6, 1),
    "repetition_penalty": (0.01, 100),
    "no_repeat_ngram_size": (0, 2**31),
}
# fields of a request that are numbers → the least and the most
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0.01, 100),
    "top_p": (1e-6, 1),
    **dict.fromkeys(PENALTIES, (-2, 2)),
}
TEXT_PARTS = ("text", "input_text", "output_text")


def check_body(body: dict[str, Any], cap: int) -> None:
    """Raises `ValueError`, naming the field, for what is out of range, of another type, or costs without limit.

    Args:
        body: of a request to complete a text or a chat.
        cap: new tokens of a request at most.
    """
    count = sum(map(len, _texts(body)))
    check_characters("the request", count)
    questions = body.get("questions")
    if isinstance(questions, dict) and count * len(questions) > MAX_PROMPT_TOKENS:  # each is a prompt of its own
        raise ValueError(
            f"`questions`: {len(questions)} with {count} characters in all; their product must be at most "
            f"{MAX_PROMPT_TOKENS}."
        )
    for name in TOKEN_FIELDS:
        if body.get(name) is not None:
            check_tokens(name, body[name], cap)
    for name, limits in NUMBERS.items():
        if body.get(name) is not None:
            check_number(name, body[name], *limits)
    seed = body.get("seed")
    if seed is not None and (type(seed) is not int or not 0 <= seed < 2**63):
        raise ValueError(f"`seed` must be a whole number of at least 0, got {shown(seed)}.")
    _check_stop(body.get("stop"))
    _check_template_variables(body.get("chat_template_kwargs"))
    for name in ("messages", "input"):
        if isinstance(body.get(name), list):
            _check_parts(name, body[name])
    _check_messages(body)
    if body.get("generation_config") is not None:
        _check_generation_config(body["generation_config"], cap)


def check_characters(name: str, count: int, who: str = "the server") -> None:
    """Raises `ValueError` for a text that is too long to be cut into tokens."""
    if count > MAX_CHARACTERS:
        raise ValueError(f"{name} has {count} characters: {who} reads at most {MAX_CHARACTERS}.")


def check_tokens(name: str, value: Any, cap: int) -> None:
    """Raises `ValueError` unless the value is a number of 1 to `cap`."""
    if type(value) is not int or not 1 <= value <= cap:
        raise ValueError(
            f"`{name}` must be a number of 1 to {cap} (--max_new_tokens of the server), got {shown(value)}."
        )


def _texts(value: Any) -> Iterator[str]:
    """All text in a JSON value."""
    values = [value]
    while values:
        each = values.pop()
        if isinstance(each, str):
            yield each
        elif isinstance(each, (dict, list)):
            values += [*each, *each.values()] if isinstance(each, dict) else each


def check_number(name: str, value: Any, least: float, most: float) -> None:
    """Raises `ValueError` unless the value is a number of `least` to `most`, or a temperature of 0: the likeliest
    token."""
    takes_0 = name.endswith("temperature") and least > 0
    if type(value) not in (int, float) or not (least <= value <= most or (takes_0 and value == 0)):
        raise ValueError(
            f"`{name}` must be {'0, or ' if takes_0 else 'a number of '}{least} to {most}, got {shown(value)}."
        )


def check_logit_bias(bias: Any, vocab_size: int) -> dict[tuple[int, ...], float]:
    """→ the `sequence_bias` of transformers that says the same; raises `ValueError` unless it maps tokens to numbers of
    -100 to 100."""
    is_right = isinstance(bias, dict) and all(
        token.isascii()
        and token.isdecimal()
        and len(token) < 10
        and int(token) < vocab_size
        and type(value) in (int, float)
        and -100 <= value <= 100
        for token, value in bias.items()
    )
    if not is_right:
        raise ValueError(
            f"`logit_bias` must map tokens, as texts of 0 to {vocab_size - 1}, to numbers of -100 to 100, "
            f"got {shown(bias)}."
        )
    return {(int(token),): float(value) for token, value in bias.items()}


def _check_stop(stop: Any) -> None:
    """Each text is compared with the whole vocabulary before the first token."""
    if stop is None:
        return
    texts = [stop] if isinstance(stop, str) else stop
    is_list = isinstance(texts, list) and 1 <= len(texts) <= MAX_STOPS
    if not is_list or not all(isinstance(text, str) and 1 <= len(text) <= MAX_STOP_CHARACTERS for text in texts):
        raise ValueError(
            f"`stop` must be 1 to {MAX_STOPS} texts of 1 to {MAX_STOP_CHARACTERS} characters, got {shown(stop)}."
        )


def _check_template_variables(variables: Any) -> None:
    """A template of the request's own could run for ever, and other arguments change what the server gets."""
    if variables is None:
        return
    if not isinstance(variables, dict):
        raise ValueError(f"`chat_template_kwargs` must be a dictionary, got {shown(variables)}.")
    own = set(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
    if taken := sorted(own & set(variables)):
        raise ValueError(f"`chat_template_kwargs` must hold variables of the model's template only, got {taken[0]!r}.")


def _check_parts(name: str, messages: list[Any]) -> None:
    """What is no text would be left out of what the model reads."""
    for message in messages:
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            kind = part.get("type") if isinstance(part, dict) else part
            if kind not in TEXT_PARTS or not isinstance(part.get("text"), str):
                raise ValueError(f"`{name}` must hold text only, got a part of type {shown(kind)}.")


def _check_messages(body: dict[str, Any]) -> None:
    """What is no chat would be an error without a reason, deep in transformers."""
    if "messages" in body:
        messages = body["messages"]
        is_chat = isinstance(messages, list) and messages and all(map(_is_message, messages))
        if not is_chat:
            raise ValueError(
                '`messages` must be a list of {"role": .., "content": ..}, the content a text or parts of type "text", '
                f"got {shown(messages)}."
            )
    value = body.get("input", "")
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" not in value[0]:
        _check_parts("input", [{"content": value}])  # of one message
    elif not isinstance(value, str) and not (isinstance(value, list) and value and all(map(_is_item, value))):
        raise ValueError(f"`input` must be a text or a list of messages, got {shown(value)}.")


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message.get("content"), (str, list, type(None)))


def _is_item(item: Any) -> bool:
    """Whether it is a message, or what else a conversation may hold, which has a type instead of a role."""
    return _is_message(item) or (isinstance(item, dict) and "role" not in item and isinstance(item.get("type"), str))


def _check_generation_config(text: Any, cap: int) -> None:
    try:
        fields = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise ValueError(f"`generation_config` must be a dictionary as JSON, in a text, got {shown(text)}.")
    for name, value in fields.items():
        where = f"generation_config.{name}"
        if name == "do_sample":
            if type(value) is not bool:
                raise ValueError(f"`{where}` must be true or false, got {shown(value)}.")
        elif name not in GENERATION_FIELDS:
            allowed = ["do_sample", *GENERATION_FIELDS]
            raise ValueError(f"`generation_config` must hold fields of {allowed}, got {shown(name)}.")
        elif name in ("max_new_tokens", "max_length"):
            check_tokens(where, value, cap)
        else:
            check_number(where, value, *GENERATION_FIELDS[name])


def check_first(handler: Any, check: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Makes a handler of the server go on with what `check` makes of the body of a request, before it does anything
    else; a field that is null is one that was not given."""
    handle = handler.handle_request

    async def checked(body: Any, *args: Any) -> Any:
        if isinstance(body, dict):  # audio comes as a form
            body = check({name: value for name, value in body.items() if value is not None})
        answer = await handle(body, *args)
        if hasattr(answer, "body_iterator"):
            answer.body_iterator = errors_in_form(answer.body_iterator)
        return answer

    handler.handle_request = checked
