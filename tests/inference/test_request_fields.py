"""Every field of OpenAI's requests is served, asks for nothing, changes nothing, or is refused by name."""

import pytest

from hf_relpos.inference.request_checks import check_logit_bias
from hf_relpos.inference.request_fields import REQUESTS, served_fields


PARAMETERS = {
    "completion_handler": "openai.types.completion_create_params.CompletionCreateParamsStreaming",
    "chat_handler": "openai.types.chat.completion_create_params.CompletionCreateParamsStreaming",
    "response_handler": "openai.types.responses.response_create_params.ResponseCreateParamsStreaming",
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_each_field_of_the_client_is_known(name):
    pytest.importorskip("openai")
    module, _, kind = PARAMETERS[name].rpartition(".")
    fields, theirs = REQUESTS[name], getattr(__import__(module, fromlist=[kind]), kind).__annotations__
    own = {"tools", "tool_choice", "parallel_tool_calls", "stream_options"}
    missing = {*theirs} - fields.served - fields.harmless - {*fields.defaults} - own
    assert not missing and not fields.served & {*fields.defaults} and not fields.harmless & {*fields.defaults}


REFUSED = [
    ("completion_handler", "logprobs", [0, 5, True, "x"], "null or false"),  # 0 is that of the token itself
    ("completion_handler", "echo", [True, 0, 1], "null or false"),
    ("completion_handler", "suffix", ["end"], 'null or ""'),
    ("chat_handler", "logprobs", [True, 1], "null or false"),
    ("chat_handler", "top_logprobs", [3], "null or 0"),
    ("chat_handler", "tools", [[{"type": "function"}], "x"], "null or []"),
    ("chat_handler", "tool_choice", ["required", {"type": "function"}], 'null or "none" or "auto"'),
    ("chat_handler", "response_format", [{"type": "json_object"}, {"type": "json_schema"}, "text"], '{"type": "text"}'),
    ("chat_handler", "reasoning_effort", ["high"], 'null or "none"'),
    ("chat_handler", "functions", [[{"name": "f"}]], "null or []"),
    ("response_handler", "background", [True], "null or false"),
    ("response_handler", "text", [{"format": {"type": "json_object"}}, {"verbosity": "low"}], "null or {"),
    ("response_handler", "previous_response_id", ["resp_1"], "left out, or null"),
    ("response_handler", "reasoning", [{"effort": "low"}, {"summary": "auto"}], "null or {"),
    *((name, "n", [10**6, 0, "1", True], "null or 1") for name in ("completion_handler", "chat_handler")),
    ("completion_handler", "best_of", [2], "null or 1"),
]


@pytest.mark.parametrize("name, field, values, allowed", REFUSED, ids=lambda value: str(value)[:30])
def test_what_is_not_served_is_refused_by_name(name, field, values, allowed):
    for value in values:
        with pytest.raises(ValueError) as error:
            served_fields(REQUESTS[name], {field: value})
        message = str(error.value)
        assert (
            message.startswith(f"`{field}` is not served here") and allowed in message and repr(value)[:60] in message
        )


def test_what_asks_for_nothing_passes_and_what_is_not_known_does_not():
    asked = {"prompt": "a", "temperature": 0, "stop": "b", "logit_bias": {"5": 1}}
    idle = {"logprobs": False, "echo": False, "n": 1, "best_of": 1, "suffix": "", "user": "me"}
    idle |= {"stream_options": {"include_usage": True}, "metadata": {"a": "b"}}
    assert served_fields(REQUESTS["completion_handler"], asked | idle) == asked
    chat = {"messages": [], "response_format": {"type": "text"}, "tool_choice": "auto", "modalities": ["text"]}
    chat |= {"top_logprobs": 0, "tools": [], "verbosity": "medium", "parallel_tool_calls": True, "store": True}
    assert served_fields(REQUESTS["chat_handler"], chat) == {"messages": []}
    response = {"input": "a", "text": {"format": {"type": "text"}}, "truncation": "disabled", "include": []}
    assert served_fields(REQUESTS["response_handler"], response) == {"input": "a", "stream": False}
    for body, message in (
        ({"max_token": 5}, "`max_token` is no field of a completion request here, which takes \\['frequency_penalty'"),
        ({"stream": "yes"}, "`stream` must be true or false, got 'yes'"),
        ({"stream_options": {"include_usage": 1}}, "`stream_options` must be a dictionary of"),
        ({"stream_options": {"continuous": True}}, "`stream_options` must be a dictionary of"),
    ):
        with pytest.raises(ValueError, match=message):
            served_fields(REQUESTS["completion_handler"], body)


def test_tools_are_served_where_the_tokenizer_says_how_they_are_called():
    body = {"messages": [], "tools": [{"type": "function"}], "tool_choice": "auto"}
    assert served_fields(REQUESTS["chat_handler"], body, True) == {"messages": [], "tools": [{"type": "function"}]}
    for more in ({"tool_choice": "none"}, {"parallel_tool_calls": False}):
        with pytest.raises(ValueError, match="is not served here"):
            served_fields(REQUESTS["chat_handler"], body | more, True)


def test_a_bias_of_tokens():
    assert check_logit_bias({"5": -100, "96": 0.5}, 97) == {(5,): -100.0, (96,): 0.5}
    for bias in ({"97": 1}, {"a": 1}, {"5": 101}, {"5": True}, {"5": float("nan")}, [5], {"-1": 1}, "5"):
        with pytest.raises(ValueError, match="`logit_bias` must map tokens, as texts of 0 to 96"):
            check_logit_bias(bias, 97)
