"""What a request to the server may hold, without a server: each of these would hold up the answers to others."""

import asyncio
import json
import sys
from types import SimpleNamespace

import pytest

from hf_relpos.inference import serve
from hf_relpos.inference.request_checks import MAX_BODY, MAX_CHARACTERS, check_body, check_first
from hf_relpos.inference.serving_limits import CLIENT, Client, FollowClient, _fit, _skip_gone, pin_model
from hf_relpos.inference.token_penalties import PENALTIES


def options(**fields):
    return {"generation_config": json.dumps(fields)}


def content(*parts):
    return {"messages": [{"role": "user", "content": [*parts]}]}


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
NAN, INFINITY = float("nan"), float("inf")
BAD = [
    *((options(**{name: 10**7}), f"`generation_config.{name}` must be") for name in ("max_new_tokens", "max_length")),
    (options(max_new_tokens=None), "`generation_config.max_new_tokens` must be a number of 1 to 160"),
    (options(num_beams=2000), "`generation_config.num_beams` must be a number of 1 to 8, got 2000"),
    (options(num_beams=2.0**40), "`generation_config.num_beams`"),
    (options(num_return_sequences=5000), "`generation_config` must hold fields of"),
    (options(return_dict_in_generate=True), "`generation_config` must hold fields of"),
    (options(cache_implementation="static"), "got 'cache_implementation'"),
    (options(prompt_lookup_num_tokens=10**6), "got 'prompt_lookup_num_tokens'"),
    (options(penalty_alpha=0.6), "got 'penalty_alpha'"),
    (options(stop_strings=["a"] * 10**4), "got 'stop_strings'"),
    (options(do_sample="yes"), "`generation_config.do_sample` must be true or false"),
    (options(temperature=1e-320), "`generation_config.temperature`"),
    *(
        ({"generation_config": text}, "must be a dictionary as JSON")
        for text in ("[1]", "{", "5", 5, {"a": 1}, "[" * 10**5)
    ),
    (options(temperature=-1), "`generation_config.temperature` must be 0, or 0.01 to 100, got -1"),
    *(
        ({"temperature": value}, "`temperature` must be 0, or 0.01 to 100, got")
        for value in (-1, 1e-320, NAN, INFINITY, "hot", True, [1])
    ),
    *(({"top_p": value}, "`top_p` must be a number") for value in (2, 0, -1, NAN, "x")),
    *(
        ({name: value}, f"`{name}` must be a number of -2 to 2, got")
        for name in PENALTIES
        for value in (-2.1, 3, NAN, "x", {}, True)
    ),
    *(({"seed": value}, "`seed` must be a whole number") for value in (1.5, True, -1, 2**63, "1")),
    *(({"max_tokens": value}, "`max_tokens` must be a number of 1 to 160") for value in (0, 161, True, 2.5, "5", [1])),
    *(
        ({"stop": value}, "`stop` must be 1 to 16 texts")
        for value in ("", [], [""], [None], [["a"]], {"a": 1}, 5, False)
    ),
    ({"stop": [f"x{index}" for index in range(17)]}, "`stop` must be 1 to 16 texts"),
    ({"stop": "the " * 100}, "`stop` must be 1 to 16 texts of 1 to 256 characters"),
    ({"prompt": "a" * (MAX_CHARACTERS + 1)}, "the request has 262151 characters: the server reads at most 262144"),
    ({"messages": [{"role": "user", "content": "a"}] * 20000}, "the request has 320008 characters"),
    ({"tools": [{"a" * MAX_CHARACTERS: {"b": ["c"]}}]}, "the request has 262151 characters"),
    ({"state": "a" * 1000, "questions": dict.fromkeys("abcdefghij", {})}, "`questions`: 10 with 1024 characters"),
    ({"chat_template_kwargs": {"chat_template": LOOP}}, "variables of the model's template only, got 'chat_template'"),
    ({"chat_template_kwargs": {"padding": "max_length", "max_length": 10**8}}, "got 'max_length'"),
    ({"chat_template_kwargs": {"tokenizer_kwargs": {}}}, "got 'tokenizer_kwargs'"),
    ({"chat_template_kwargs": 5}, "`chat_template_kwargs` must be a dictionary"),
    (
        content({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}),
        "text only, got a part of type 'image",
    ),
    *((content(part), "`messages` must hold text only") for part in ({"type": "text"}, {}, 5, None, {"type": []})),
    ({"input": [{"content": [{"type": "input_audio"}]}]}, "`input` must hold text only"),
    *(
        ({"messages": value}, '`messages` must be a list of {"role": .., "content": ..}')
        for value in ("a", [], [{}], [1], [{"role": "user", "content": 5}], [{"role": 5, "content": "a"}])
    ),
    *(({"input": value}, "`input` must be a text or a list of messages") for value in (5, {"role": "user"}, [], [5])),
    *(({"input": [part]}, "`input` must hold text only") for part in ({"type": "nothing"}, {"type": "input_image"})),
]


@pytest.mark.parametrize("body, message", BAD, ids=lambda value: str(value)[:50])
def test_refuses(body, message):
    with pytest.raises(ValueError) as error:
        check_body(body, 160)
    assert message in str(error.value) and len(str(error.value)) < 500


GOOD = [
    {},
    {"prompt": "a" * (MAX_CHARACTERS - 16), "max_tokens": 160},
    {"temperature": 0, "top_p": 1, "frequency_penalty": 0.0, "seed": 0, "n": 1, "stop": ["\n"] * 16},
    options(temperature=0),
    options(do_sample=True, temperature=0.5, top_k=5, top_p=0.9, num_beams=4, max_new_tokens=1),
    {"stop": "\n\n", "chat_template_kwargs": {"enable_thinking": False}},
    content({"type": "text", "text": "a"}) | {"input": "a"},
    {"input": [{"role": "user", "content": "a"}, {"type": "message"}]},
    {"input": [{"type": "input_text", "text": "a"}]},
]


@pytest.mark.parametrize("body", GOOD, ids=lambda value: str(value)[:50])
def test_takes(body):
    check_body(body, 160)


def test_what_is_null_was_not_given():
    async def handle(body, request_id):
        return body, request_id

    handler = SimpleNamespace(handle_request=handle)
    check_first(handler, lambda body: {**body, "checked": True})
    found = asyncio.run(handler.handle_request({"prompt": "a", "chat_template_kwargs": None, "seed": 0}, "id"))
    assert found == ({"prompt": "a", "seed": 0, "checked": True}, "id")
    assert asyncio.run(handler.handle_request("a form", "id")) == ("a form", "id")


@pytest.mark.parametrize("positions, most", [(160, 8192), (20000, 20000)])
def test_a_prompt_has_as_many_tokens_as_a_model_is_made_for(positions, most):
    CLIENT.set(Client())
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions, max_positions=None))
    _fit(model, {"input_ids": [5] * most}, None)
    with pytest.raises(ValueError, match=f"the prompt has {most + 1} tokens: the server reads at most {most}"):
        _fit(model, {"input_ids": [5] * (most + 1)}, None)


def test_a_request_that_waits_costs_nothing_once_its_client_has_gone():
    client = Client()
    CLIENT.set(client)
    submit = _skip_gone(lambda function, **kwargs: lambda: function(**kwargs))
    waiting = submit(lambda input_ids: "computed", input_ids="the prompt")
    assert waiting() == "computed"
    client.leave()
    assert waiting() == "the prompt"
    assert submit(lambda: "no generation")() == "no generation"


def test_a_long_body_is_not_kept(monkeypatch):
    sent, left = [], iter(range(10**6))

    async def receive():
        next(left)
        return {"type": "http.request", "body": b"a" * 2**16, "more_body": True}

    async def send(message):
        sent.append(message)

    async def app(*arguments):
        raise AssertionError("it was read whole")

    asyncio.run(FollowClient(app)({"type": "http"}, receive, send))
    assert sent[0]["status"] == 413 and f"more than {MAX_BODY} bytes" in sent[1]["body"].decode()
    assert next(left) < 2 * MAX_BODY / 2**16


@pytest.mark.parametrize("name", ["gpt2", "/etc", "model/../other", 5, None, ["model"]])
def test_no_other_model_is_loaded(name):
    manager = SimpleNamespace(process_model_name=lambda name: f"{name}@main", force_model="model")
    pin_model(manager)
    assert manager.process_model_name("model") == "model@main"
    with pytest.raises(ValueError, match="the server is pinned to 'model'"):
        manager.process_model_name(name)


def test_names_the_missing_packages(monkeypatch, capsys):
    """Help needs them for the flags of the server alone."""
    monkeypatch.setattr(serve, "is_serve_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["hf-relpos", "serve", "--help"])
    serve.main()
    needed = 'serving needs the extra `serve` of hf_relpos: pip install -c constraints.txt -e ".[serve]"\n'
    printed = capsys.readouterr().out
    assert printed.startswith("usage: hf-relpos serve DIR") and printed.endswith(needed)
    monkeypatch.setattr(sys, "argv", ["hf-relpos", "serve", "somewhere"])
    with pytest.raises(SystemExit, match="2"):
        serve.main()
    assert capsys.readouterr().err == f"hf-relpos: error: {needed}"
