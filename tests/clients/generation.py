"""Generation: pipelines, servers, the ways of `generate`."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial

from clients.harness import CONTROL, Subject, client


NEW_TOKENS = 8
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False}


def greedy_text(subject: Subject, model, text: str) -> str:
    tokens = subject.tokenizer(text, return_tensors="pt")
    new = model.generate(**tokens, **GREEDY)[0, tokens["input_ids"].shape[1] :]
    return subject.tokenizer.decode(new, skip_special_tokens=True)


@client("Pipelines of transformers", "transformers")
def run_pipeline(subject: Subject):
    """`pipeline("text-generation")` on a padded batch and on a chat: the texts of `generate`."""
    from transformers import pipeline

    generate, model = pipeline("text-generation", model=str(subject.folder), trust_remote_code=True), subject.load()
    generate.tokenizer.padding_side = "left"
    prompts = subject.texts(3)
    together = generate(prompts, batch_size=3, return_full_text=False, **GREEDY)
    assert [row["generated_text"] for (row,) in together] == [greedy_text(subject, model, text) for text in prompts]
    (chat,) = generate([{"role": "user", "content": "the state"}], **GREEDY)
    assert chat["generated_text"][-1]["content"] == greedy_text(subject, model, "user: the state\nassistant:")


@client("`generate`", "transformers")
def run_generate(subject: Subject):
    """Greedy tokens and beams by each cache and with an assistant are those without a cache; samples repeat by seed."""
    import torch

    model, tokens = subject.load(), subject.tokens(2, 12)
    model.generation_config.eos_token_id = None
    expected = model.generate(tokens, use_cache=False, **GREEDY)

    def same(tokens, **options):
        assert torch.equal(model.generate(tokens, **GREEDY, **options), expected[: len(tokens)])

    def near(**options):  # keys in fewer bits: other tokens may come out
        assert model.generate(tokens, **GREEDY, **options).shape == expected.shape

    def repeats(**options):
        def sample():
            torch.manual_seed(3)
            return model.generate(tokens, max_new_tokens=NEW_TOKENS, **options)

        without = {"use_cache": False} if "num_beams" in options else {}
        made = sample()
        assert torch.equal(sample(), made)
        if without:
            assert torch.equal(model.generate(tokens, max_new_tokens=NEW_TOKENS, **options, **without), made)

    quantized = {"cache_implementation": "quantized", "cache_config": {"backend": "quanto", "nbits": 4}}
    return {
        "dynamic cache": partial(same, tokens),
        "static cache": partial(same, tokens, cache_implementation="static"),
        "quantized cache": partial(near, **quantized),
        "prompt lookup": partial(same, tokens[:1], prompt_lookup_num_tokens=3),
        "assistant": partial(same, tokens[:1], assistant_model=subject.load()),
        "chunked prefill": partial(same, tokens, prefill_chunk_size=4),
        "beams": partial(repeats, num_beams=3, do_sample=False),
        "sampling": partial(repeats, do_sample=True, top_p=0.9),
    }


@client("OpenAI-style server", "openai", "fastapi", "uvicorn")
def run_server(subject: Subject):
    """A completion through the `openai` client: the text of `generate`. `hf-relpos serve` here; for Llama
    `transformers serve`, which loads no custom code."""
    import openai

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = "from transformers.cli.transformers import main; main()"
    command = ["-c", program, "serve"] if subject.scheme == CONTROL else ["-m", "hf_relpos", "serve"]
    flags = [str(subject.folder), "--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    server = subprocess.Popen([sys.executable, *command, *flags], env=environment)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, f"the server ended with code {server.returncode}"
                time.sleep(0.3)
        api = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60)
        request = {"model": str(subject.folder), "temperature": 0, "max_tokens": NEW_TOKENS}
        text = api.completions.create(prompt="the state of", **request).choices[0].text
        assert text == greedy_text(subject, subject.load(), "the state of"), json.dumps(text)
    finally:
        server.terminate()
