"""`hf-relpos serve` answers as the model does in this process, and says what it cannot serve."""

import http.client
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, save_with_tokenizer
from transformers import LlamaConfig

from hf_relpos.inference import serve as serving
from hf_relpos.inference.serving_limits import NO_TEMPLATE


pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
MESSAGES = [{"role": "user", "content": "the state of the union"}]
PROMPT = "congress and the people"
NEW_TOKENS = 12
# no update check, no look at a hub; the proxy of a test machine has no business on the loopback
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "NO_PROXY": "*", "CUDA_VISIBLE_DEVICES": ""}


@contextmanager
def serve(folder, *options: str):
    """→ a client of a server of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_relpos", "serve", str(folder), "--device", "cpu"]
    command += ["--host", "127.0.0.1", "--port", str(port), *options]
    with (
        open(f"{folder}.log", "w+", encoding="utf-8") as log,
        subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env={**os.environ, **ENVIRONMENT}) as server,
    ):
        try:
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            deadline = time.monotonic() + 120
            while True:
                try:
                    with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    log.seek(0)
                    assert server.poll() is None and time.monotonic() < deadline, log.read()
                    time.sleep(0.2)
            url = f"http://127.0.0.1:{port}/v1"
            with openai.DefaultHttpxClient(trust_env=False) as http:
                yield openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60, http_client=http)
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


@pytest.fixture(scope="module", params=["linear_cpb", "rotary"])
def served(request, tmp_path_factory):
    """→ a client, the name of the model it talks to, and that model in this process."""
    folder = tmp_path_factory.mktemp("served") / request.param
    model = save_with_tokenizer(folder, request.param, TEMPLATE)
    with serve(folder) as client:
        yield client, str(folder), model


def greedy_text(model, tokenizer, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def expected_texts(model) -> tuple[str, str]:
    """→ what follows the chat, and what follows the prompt."""
    tokenizer = make_tokenizer(TEMPLATE)
    chat = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    texts = greedy_text(model, tokenizer, chat), greedy_text(model, tokenizer, PROMPT)
    assert all(len(text) >= NEW_TOKENS for text in texts) and texts[0] != texts[1]
    return texts


def test_chat(served):
    client, name, model = served
    request = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS}
    answer = client.chat.completions.create(**request)
    assert answer.choices[0].message.content == expected_texts(model)[0]
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == NEW_TOKENS
    pieces = [chunk.choices[0].delta.content for chunk in client.chat.completions.create(**request, stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 2 and "".join(pieces) == answer.choices[0].message.content


def test_completion(served):
    client, name, model = served
    request = {"model": name, "prompt": PROMPT, "temperature": 0, "max_tokens": NEW_TOKENS}
    answer = client.completions.create(**request)
    assert answer.choices[0].text == expected_texts(model)[1]
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 2 and "".join(pieces) == answer.choices[0].text


def test_a_temperature_samples_and_a_seed_repeats_it(served):
    client, name, model = served
    greedy = expected_texts(model)[1]

    def text(stream=False, **fields):
        answer = client.completions.create(model=name, prompt=PROMPT, max_tokens=NEW_TOKENS, stream=stream, **fields)
        return "".join(chunk.choices[0].text for chunk in answer) if stream else answer.choices[0].text

    for stream in (False, True):
        first = text(stream, temperature=9, seed=1)
        assert first == text(stream, temperature=9, seed=1) and first != greedy
        assert first != text(stream, temperature=9, seed=2)
    assert len({text(top_p=0.99) for _ in range(4)}) > 1
    assert text(temperature=0, top_p=0.5, seed=1) == text(top_p=1) == text() == greedy
    options = [{"temperature": 9}, {"temperature": 9, "do_sample": False}]
    sampled, taken = (text(extra_body={"generation_config": json.dumps(fields)}, seed=1) for fields in options)
    assert sampled != taken
    chat = {"model": name, "messages": MESSAGES, "max_tokens": NEW_TOKENS, "temperature": 9}
    replies = [client.chat.completions.create(**chat, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert replies[0] == replies[1] != replies[2]
    with pytest.raises(openai.BadRequestError, match="`prompt` must be given"):
        client.post("/completions", body={"model": name, "max_tokens": 2}, cast_to=dict)
    log = Path(f"{name}.log").read_text(encoding="utf-8")
    assert log.index("Application startup complete") < log.index("next: curl")


def test_lists_the_served_model_and_no_other(served):
    client, name, _ = served
    assert [model.id for model in client.models.list()] == [name]
    with pytest.raises(openai.NotFoundError, match="`model`: the server is pinned to") as error:
        client.completions.create(model="gpt2", prompt=PROMPT, max_tokens=1)
    assert error.value.code == "model_not_found"


def test_a_text_ends_before_its_stop_text(served):
    client, name, model = served
    chat_text, text = expected_texts(model)
    request = {"model": name, "temperature": 0, "max_tokens": NEW_TOKENS, "prompt": PROMPT}
    stop = text[len(text) // 2 :][:3]  # a piece of a token, or of two
    answer = client.completions.create(**request, stop=["@@", stop]).choices[0]
    assert answer.text == text[: text.index(stop)] and answer.finish_reason == "stop"
    pieces = [chunk.choices[0] for chunk in client.completions.create(**request, stop=stop, stream=True)]
    assert "".join(piece.text for piece in pieces) == answer.text and pieces[-1].finish_reason == "stop"
    last = client.completions.create(**request, stop=text[-2:]).choices[0]  # as long as it may be
    assert last.text == text[: text.index(text[-2:])] and last.finish_reason == "stop"
    chat = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS, "stop": chat_text[5:7]}
    answer = client.chat.completions.create(**chat).choices[0]
    assert answer.message.content == chat_text[: chat_text.index(chat["stop"])] and answer.finish_reason == "stop"
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**chat, stream=True)]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == answer.message.content
    assert chunks[-1].finish_reason == "stop"


def test_a_bias_bans_tokens_in_both_kinds_of_request(served):
    client, name, model = served
    banned = make_tokenizer(TEMPLATE)(expected_texts(model)[1])["input_ids"]
    request = {"model": name, "temperature": 0, "max_tokens": 1, "logit_bias": {str(token): -100 for token in banned}}
    text = client.completions.create(prompt=PROMPT, **request).choices[0].text
    assert text and not expected_texts(model)[1].startswith(text)
    client.chat.completions.create(messages=MESSAGES, **request)
    with pytest.raises(openai.BadRequestError, match="`logit_bias` must map tokens, as texts of 0 to"):
        client.completions.create(prompt=PROMPT, **request | {"logit_bias": {"99999": 1}})


def penalized_text(model, tokenizer, prompt, frequency, presence) -> str:
    """What follows, token by token: each the likeliest after what its earlier ones cost it."""
    row = tokenizer(prompt)["input_ids"]
    new = []
    for _ in range(NEW_TOKENS):
        with torch.no_grad():
            scores = model(torch.tensor([row + new])).logits[0, -1].tolist()
        for token in set(new):
            scores[token] -= frequency * new.count(token) + presence
        new.append(max(range(len(scores)), key=scores.__getitem__))
    return tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.parametrize("penalties", [(1.5, 0), (0, -2), (0.5, 0.5)], ids=str)
def test_penalties_of_tokens_are_openais(served, penalties):
    client, name, model = served
    tokenizer = make_tokenizer(TEMPLATE)
    given = dict(zip(("frequency_penalty", "presence_penalty"), penalties))
    request = {"model": name, "temperature": 0, "max_tokens": NEW_TOKENS, "prompt": PROMPT, **given}
    expected = penalized_text(model, tokenizer, PROMPT, *penalties)
    assert client.completions.create(**request).choices[0].text == expected != expected_texts(model)[1]
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
    assert "".join(pieces) == expected
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False)
    chat = {"model": name, "messages": MESSAGES, "temperature": 0, "max_tokens": NEW_TOKENS, **given}
    answer = client.chat.completions.create(**chat).choices[0].message.content
    assert answer == penalized_text(model, tokenizer, prompt, *penalties)


def test_all_errors_are_in_openais_form(served):
    client, name, _ = served
    completion = {"model": name, "prompt": PROMPT, "max_tokens": 1}
    for method, path, body, status, message in (
        ("POST", "/v1/completions", "{", 400, "the request cannot be read: "),
        ("POST", "/v1/completions", "[1]", 400, "dictionary"),
        ("POST", "/v1/completions", {**completion, "prompt": [1, 2]}, 400, "`prompt` must be one text, got [1, 2]"),
        ("POST", "/v1/completions", {**completion, "logprobs": 5}, 400, "`logprobs` is not served here"),
        ("POST", "/v1/completions", {**completion, "echo": True}, 400, "`echo` is not served here"),
        ("POST", "/v1/completions", {**completion, "max_token": 5}, 400, "`max_token` is no field of a completion"),
        ("POST", "/v1/completions", {**completion, "model": 5}, 404, "`model`: the server is pinned to"),
        ("POST", "/v1/chat/completions", {"model": name}, 400, "`messages` must be given"),
        ("POST", "/v1/responses", {"model": name, "input": 5}, 400, "`input` must be a text"),
        ("POST", "/v1/systemone", {"model": name}, 400, "state"),
        ("POST", "/v1/nothing", completion, 404, "POST /v1/nothing: Not Found"),
        ("GET", "/v1/completions", None, 405, "GET /v1/completions: Method Not Allowed"),
        ("POST", "/load_model", {}, 400, "`model`"),
    ):
        connection = http.client.HTTPConnection(client.base_url.host, client.base_url.port, timeout=20)
        content = body if isinstance(body, str) else json.dumps(body)
        connection.request(method, path, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
        connection.close()
        assert (answer.status, error["type"]) == (status, "invalid_request_error") and message in error["message"], body
    response = client.responses.create(model=name, input=PROMPT, max_output_tokens=2)  # OpenAI's default is no stream
    assert response.usage.output_tokens == 2


def test_an_empty_prompt_starts_a_document(served):
    client, name, model = served
    request = {"model": name, "temperature": 0, "max_tokens": NEW_TOKENS}
    tokenizer = make_tokenizer(TEMPLATE)
    expected = greedy_text(model, tokenizer, tokenizer.bos_token or tokenizer.eos_token)
    assert client.completions.create(prompt="", **request).choices[0].text == expected
    pieces = client.completions.create(prompt="", stream=True, **request)
    assert "".join(piece.choices[0].text for piece in pieces) == expected


def test_what_a_request_may_ask_for(served):
    """160 positions, `max_position_embeddings` of the model, is the cap; none of these may be a 500."""
    client, name, _ = served
    for count in (161, 10**7, 0, -1):
        with pytest.raises(openai.BadRequestError, match="`max_tokens` must be a number of 1 to 160"):
            client.completions.create(model=name, prompt=PROMPT, max_tokens=count)
        with pytest.raises(openai.BadRequestError, match="must be a number of 1 to 160"):
            client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=count, stream=True)
    for options in ('{"max_new_tokens": 10000000}', '{"max_length": 10000000}'):
        with pytest.raises(openai.BadRequestError, match=r"`generation_config\.max_\w+` must be a number of 1 to 160"):
            client.completions.create(model=name, prompt=PROMPT, extra_body={"generation_config": options})
    answer = client.completions.create(model=name, prompt=PROMPT)
    assert answer.usage.completion_tokens <= 160
    others = [{"messages": content} for content in ("x", None, [{}], [1], [{"role": "user", "content": 5}])]
    others += [{"prompt": PROMPT, "seed": seed} for seed in ("x", 10**30, -1)] + [{"prompt": PROMPT, "stop": 5}]
    others += [{"messages": MESSAGES, "logit_bias": [5]}, {"prompt": 5}, {"prompt": PROMPT, "temperature": "hot"}]
    for body in others:
        path = "/chat/completions" if "messages" in body else "/completions"
        with pytest.raises(openai.BadRequestError):
            client.post(path, body={"model": name, **body}, cast_to=dict)


def test_what_would_hold_up_others_is_refused(served):
    """A prompt without end, a template of the request's own, a body that is no request, another model."""
    client, name, _ = served
    template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    chat = {"model": name, "messages": MESSAGES, "max_tokens": 2}
    for path, body, code, message in (
        ("/completions", {"model": name, "prompt": "the state " * 9000}, 400, "tokens: the server reads at most 8192"),
        ("/completions", {"model": name, "prompt": "a" * 300_000}, 400, "reads at most 262144"),
        ("/completions", {"model": name, "prompt": "a" * 3_000_000}, 413, "more than 2097152 bytes"),
        ("/chat/completions", {**chat, "chat_template_kwargs": {"chat_template": template}}, 400, "chat_template"),
        ("/responses", {"model": name, "input": "the state " * 9000, "stream": True}, 400, "reads at most 8192"),
        ("/../load_model", {"model": "/etc"}, 404, "the server is pinned to"),
    ):
        begun = time.monotonic()
        with pytest.raises(openai.APIStatusError) as error:
            client.post(path, body=body, cast_to=dict)
        assert error.value.status_code == code and message in error.value.message
        assert time.monotonic() - begun < 20
    answer = client.chat.completions.create(**chat, extra_body={"chat_template_kwargs": None})
    assert answer.usage.completion_tokens == 2


@pytest.mark.parametrize(
    "path, text", [("completions", {"prompt": PROMPT}), ("chat/completions", {"messages": MESSAGES})]
)
def test_a_client_that_has_gone_holds_nobody_up(path, text, tmp_path):
    """Ten minutes of tokens, asked for and left, with and without a stream: the next request is answered at once."""
    save_with_tokenizer(tmp_path / "alibi", "alibi", TEMPLATE, eos_token_id=None)
    with serve(tmp_path / "alibi", "--max_new_tokens", "1000000") as client:
        short = {"model": str(tmp_path / "alibi"), "prompt": PROMPT, "temperature": 0, "max_tokens": 2}
        client.completions.create(**short)
        for stream in (False, True):
            body = {"model": short["model"], "max_tokens": 1_000_000, "temperature": 0, "stream": stream, **text}
            address = client.base_url
            connection = http.client.HTTPConnection(address.host, address.port, timeout=2)
            connection.request("POST", f"/v1/{path}", json.dumps(body), {"Content-Type": "application/json"})
            with suppress(TimeoutError):
                connection.getresponse().read(300)
            connection.close()
            begun = time.monotonic()
            client.completions.create(**short)
            assert time.monotonic() - begun < 20


def test_says_what_is_wrong_with_a_request(tmp_path):
    """A model saved without a chat template completes; a chat, or a text past its learned table, gets the reason."""
    model = save_with_tokenizer(tmp_path / "learned", "learned")
    request = {"model": str(tmp_path / "learned"), "temperature": 0, "max_tokens": NEW_TOKENS}
    with serve(tmp_path / "learned") as client:
        assert client.completions.create(prompt=PROMPT, **request).choices[0].text == expected_texts(model)[1]
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=NO_TEMPLATE) as error:
                client.chat.completions.create(messages=MESSAGES, stream=stream, **request)
            assert "http" not in error.value.message
        with pytest.raises(openai.BadRequestError, match=NO_TEMPLATE):
            client.responses.create(model=request["model"], input=PROMPT)
        log = Path(f"{request['model']}.log").read_text(encoding="utf-8")
        assert log.index(f"\n{NO_TEMPLATE}\n") < log.index("next: curl")
        assert client.completions.create(prompt=PROMPT, model=request["model"]).usage.total_tokens <= 160
        with pytest.raises(openai.BadRequestError, match="max_position_embeddings"):
            client.completions.create(prompt="the " * 200, **request)
        with pytest.raises(openai.APIError, match="max_position_embeddings"):
            list(client.completions.create(prompt="the " * 200, stream=True, **request))


def test_continuous_batching(tmp_path):
    model = save_with_tokenizer(tmp_path / "rotary", "rotary", TEMPLATE)
    request = {"model": str(tmp_path / "rotary"), "prompt": PROMPT, "temperature": 0, "max_tokens": NEW_TOKENS}
    with serve(tmp_path / "rotary", "--continuous-batching", "--cb-num-blocks", "16") as client:
        assert client.completions.create(**request).choices[0].text == expected_texts(model)[1]
        pieces = [chunk.choices[0].text for chunk in client.completions.create(**request, stream=True)]
        assert "".join(pieces) == expected_texts(model)[1]
        with pytest.raises(openai.BadRequestError, match="must be 0, .* with --continuous-batching"):
            client.completions.create(**request | {"temperature": 0.7})
        for name, value in (("frequency_penalty", 1.0), ("presence_penalty", -1), ("logit_bias", {"5": 1})):
            with pytest.raises(openai.BadRequestError, match=f"`{name}` is not served with --continuous-batching"):
                client.completions.create(**request, **{name: value})
        text = expected_texts(model)[1]
        for stream in (False, True):
            answer = client.completions.create(**request, stop=text[4:7], stream=stream)
            choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
            assert "".join(choice.text for choice in choices) == text[: text.index(text[4:7])]
            assert choices[-1].finish_reason == "stop"


def test_refuses_what_it_cannot_serve(tmp_path, monkeypatch, capsys):
    save_with_tokenizer(tmp_path / "bias", "alibi", TEMPLATE)
    LlamaConfig().save_pretrained(tmp_path / "llama")
    make_model("none").config.save_pretrained(tmp_path / "bare")
    for name in ("narrow", "lost"):
        save_with_tokenizer(tmp_path / name, "alibi")
    config = json.loads((tmp_path / "narrow" / "config.json").read_text())
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(config | {"hidden_size": 96}))
    for path in (tmp_path / "lost").glob("tokenizer*"):
        path.unlink()
    capsys.readouterr()  # bars of what was saved
    for arguments, message in (
        ([], "usage: hf-relpos serve DIR"),
        (["serve"], "usage: hf-relpos serve DIR"),
        (["train", tmp_path], "usage: hf-relpos serve DIR"),
        (["serve", tmp_path / "nothing"], "nothing' is no folder with a saved model."),
        (["serve", tmp_path / "lame"], "lame' is no folder with a saved model (did you mean"),
        (
            ["serve", tmp_path / "narrow"],
            "lm_head.weight has the shape (300, 48) in the file and (300, 96) by config.json",
        ),
        (["serve", tmp_path / "lost"], "no tokenizer in "),
        (["serve", tmp_path / "llama"], "is not a model of the family ('relpos'), got 'llama'"),
        (["serve", tmp_path / "bare"], "must hold a RelPosForCausalLM, got None"),
        (["serve", tmp_path / "bias", "--continuous-batching"], "has no place for the position bias"),
        (["serve", tmp_path / "bias", "--max_new_tokens"], "`max_new_tokens` must be one number of at least 1, got ''"),
        (["serve", tmp_path / "bias", "--max-new-tokens=0"], "`max_new_tokens` must be one number of at least 1"),
    ):
        monkeypatch.setattr(sys, "argv", ["hf-relpos", *map(str, arguments)])
        with pytest.raises(SystemExit) as error:
            serving.main()
        printed = capsys.readouterr()
        assert error.value.code == 2 and printed.out == "", arguments
        lines = [line for line in printed.err.splitlines() if line and not line.startswith("Loading weights")]
        assert len(lines) == 1 and message in lines[0], arguments
        assert "usage" not in printed.err or message.startswith("usage"), arguments


def test_refuses_on_the_command_line(tmp_path):
    """What transformers' own server finds out while it loads is one line too."""
    save_with_tokenizer(tmp_path / "bias", "alibi", TEMPLATE)
    command = [sys.executable, "-m", "hf_relpos", "serve", str(tmp_path / "bias"), "--device", "cpu"]
    command += ["--attn-implementation", "flash_attention_2"]
    environment = {**os.environ, **ENVIRONMENT}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    assert "would drop the position bias" in result.stderr.splitlines()[-1]
