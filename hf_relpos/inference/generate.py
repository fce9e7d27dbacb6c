"""Text from a saved model: one prompt streamed, or many in batches."""

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TextStreamer,
    TopPLogitsWarper,
    set_seed,
)

from ..environment import write_text
from ..file_reading import read_text_file
from ..messages import Progress
from ..model_loading import load_model, load_model_tokenizer
from ..special_tokens import document_start
from .command import GenerationArguments


DEFAULT_TOKENS = 100
# flags that are fields of GenerationConfig
SAMPLING_FLAGS = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


def generate(args: GenerationArguments) -> None:
    """Does what the command line asks for: streams one prompt, or writes JSON lines of many.

    Raises:
        ValueError: for a model or prompts that cannot be read, or that do not fit each other.
    """
    prompts = _read_prompts(args.prompt_file) if args.prompt_file else []
    model = load_model(args.model_name_or_path, AutoModelForCausalLM)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = load_model_tokenizer(args.model_name_or_path, model)
    config = _generation_config(args, model, tokenizer, prompts or [args.prompt])
    set_seed(args.seed)
    if args.prompt is not None:
        stream(model, tokenizer, args.prompt, config)
        return
    texts = list(complete(model, tokenizer, prompts, config, args.batch_size))
    lines = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for prompt, text in zip(prompts, texts)]
    if args.output_file:
        write_text(Path(args.output_file), "\n".join(lines) + "\n")
    else:
        sys.stdout.write("\n".join(lines) + "\n")


def _generation_config(
    args: GenerationArguments, model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str]
) -> GenerationConfig:
    given = {name: getattr(args, name) for name in SAMPLING_FLAGS if getattr(args, name) is not None}
    if {"temperature", "top_k", "top_p", "min_p"} & set(given) and "num_beams" not in given:
        given.setdefault("do_sample", True)  # they mean nothing otherwise
    if given.get("temperature") == 0:  # the likeliest token, as the server and the demo have it
        given |= {"temperature": 1.0, "do_sample": False}
    config = model.generation_config
    config.update(max_new_tokens=args.max_new_tokens or _default_tokens(model, tokenizer, prompts), **given)
    config.validate()
    return config


def _default_tokens(model: torch.nn.Module, tokenizer: Any, prompts: Sequence[str]) -> int:
    """How many tokens are generated if nothing says it."""
    limit = getattr(model.config, "max_positions", None)
    if limit is None:
        return DEFAULT_TOKENS
    longest = max(len(tokenizer(prompt)["input_ids"] or document_start(tokenizer)) for prompt in prompts)
    return min(DEFAULT_TOKENS, max(1, limit - longest))


def _read_prompts(path: str) -> list[str]:
    # `splitlines` would also end a line at the separators and form feeds that text may hold
    prompts = [line for line in read_text_file(path, "`prompt_file`").split("\n") if line.strip()]
    if not prompts:
        raise ValueError(f"`prompt_file` {path!r} holds no prompt.")
    return prompts


def check_window(model: Any, num_tokens: int, max_new_tokens: int) -> None:
    """Raises `ValueError` if prompt and continuation do not fit into the positions that the model supports."""
    limit = getattr(model.config, "max_positions", None)
    if limit is not None and num_tokens >= limit:
        raise ValueError(
            f"`prompt` must have fewer tokens than the learned table has positions, {limit} "
            f"(`max_position_embeddings`), got {num_tokens}."
        )
    if limit is not None and num_tokens + max_new_tokens > limit:
        raise ValueError(
            f"`max_new_tokens` must be at most {limit - num_tokens}: the learned table has {limit} positions "
            f"(`max_position_embeddings`) and the prompt takes {num_tokens}, got {max_new_tokens}."
        )


def _encode(tokenizer: Any, prompts: Sequence[str]) -> dict[str, torch.Tensor]:
    rows = [tokenizer(prompt)["input_ids"] or document_start(tokenizer) for prompt in prompts]
    return tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding=len(rows) > 1)


def stream(model: Any, tokenizer: Any, prompt: str, config: GenerationConfig) -> str:
    """Prints the prompt and its continuation token by token, and returns the continuation."""
    inputs = _encode(tokenizer, [prompt]).to(model.device)
    num_tokens = inputs["input_ids"].shape[1]
    check_window(model, num_tokens, config.max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_special_tokens=True) if config.num_beams in (None, 1) else None
    output = model.generate(**inputs, generation_config=config, streamer=streamer)
    text = tokenizer.decode(output[0, num_tokens:], skip_special_tokens=True)
    if streamer is None:
        print(prompt + text)
    return text


def sample(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 42,
) -> Iterator[tuple[list[int], str]]:
    """Samples token by token, with a random generator per call, so that several calls can be advanced in turn.

    Args:
        model: a causal language model of transformers, without dropout.
        tokenizer: the model's.
        prompt: the text to continue; empty for a new document.
        max_new_tokens: tokens at most; the end of the document ends it earlier.
        temperature: sharpness of sampling; 0 takes the likeliest token.
        top_p: sample among tokens of this total probability, in (0, 1].
        seed: of the random numbers; the tokens are those of `generate` after `set_seed(seed)`.

    Yields:
        the new tokens so far and their text, after each token; text that ends within a character ends before it.

    Raises:
        ValueError: if prompt and continuation do not fit into the positions that the model supports.
    """
    step = _encode(tokenizer, [prompt])["input_ids"].to(model.device)
    check_window(model, step.shape[1], max_new_tokens)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))] if temperature else [])
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    generator = torch.Generator(model.device).manual_seed(seed)
    cache, tokens = DynamicCache(config=model.config), []
    for _ in range(max_new_tokens):
        with torch.no_grad():  # closed before each `yield`: it would hold for whoever asks for the next token
            logits = model(step, cache=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            probabilities = warpers(step, logits).softmax(-1)
            step = torch.multinomial(probabilities, 1, generator=generator) if temperature else logits.argmax(-1, True)
        if step.item() in ends:
            return
        tokens.append(step.item())
        yield tokens, tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\ufffd")


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[str], config: GenerationConfig, batch_size: int
) -> Iterator[str]:
    """→ the continuation of each prompt, in order, in batches padded on the left."""
    if batch_size < 1:
        raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    longest = max((len(tokenizer(prompt)["input_ids"]) for prompt in prompts), default=0)
    check_window(model, longest, config.max_new_tokens)
    with Progress(len(prompts), "prompts", "generating") as progress:
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            inputs = _encode(tokenizer, batch).to(model.device)
            output = model.generate(**inputs, generation_config=config)
            progress.update(len(batch))
            yield from tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
