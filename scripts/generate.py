#!/usr/bin/env python
"""Generates text from a saved model: one prompt streamed to the terminal, or a file of prompts in batches.

python scripts/generate.py --model_name_or_path output/alibi --prompt "Fellow citizens," --max_new_tokens 100
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, set_seed

from hf_relpos.cli import command, parse_arguments
from hf_relpos.inference.generate import complete, stream
from hf_relpos.model_loading import load_model, load_model_tokenizer


@dataclass
class GenerationArguments:
    """The sampling flags are those of GenerationConfig; what is not given is the model's own."""

    model_name_or_path: str = field(metadata={"help": "A causal language model, of this family or any other."})
    prompt: str | None = field(default=None, metadata={"help": "The text to go on with; empty for a new document."})
    prompt_file: str | None = field(default=None, metadata={"help": "A text file with one prompt per line."})
    output_file: str | None = field(
        default=None, metadata={"help": "JSON lines of prompt and text, for --prompt_file; by default the terminal."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts generated at a time."})
    max_new_tokens: int = field(default=100, metadata={"help": "Tokens to generate at most."})
    do_sample: bool | None = field(default=None, metadata={"help": "Sample in place of taking the likeliest token."})
    temperature: float | None = field(default=None, metadata={"help": "Sharpness of sampling."})
    top_k: int | None = field(default=None, metadata={"help": "Sample among the k likeliest tokens."})
    top_p: float | None = field(default=None, metadata={"help": "Sample among tokens of this total probability."})
    min_p: float | None = field(default=None, metadata={"help": "Drop tokens below this share of the likeliest."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of beam search."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Penalty of tokens that occurred."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "Length of runs that may occur once."})
    seed: int = field(default=42, metadata={"help": "Seed of sampling."})


SAMPLING = (
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "num_beams",
    "repetition_penalty",
    "no_repeat_ngram_size",
)


@command
def main() -> None:
    (args,) = parse_arguments((GenerationArguments,), __doc__)
    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError("exactly one of --prompt and --prompt_file is needed.")
    if args.max_new_tokens < 1:
        raise ValueError(f"`max_new_tokens` must be at least 1, got {args.max_new_tokens}.")
    target = Path(args.output_file) if args.output_file else None
    if target and (args.prompt_file is None or target.exists() or not target.parent.is_dir()):
        raise ValueError(f"`output_file` {args.output_file!r} must be new, in a folder, and needs --prompt_file.")
    prompts = _read_prompts(args.prompt_file) if args.prompt_file else []
    model = load_model(args.model_name_or_path, AutoModelForCausalLM)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = load_model_tokenizer(args.model_name_or_path, model)
    config = _generation_config(args, model)
    set_seed(args.seed)
    if args.prompt is not None:
        stream(model, tokenizer, args.prompt, config)
        return
    texts = list(complete(model, tokenizer, prompts, config, args.batch_size))
    lines = [json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False) for prompt, text in zip(prompts, texts)]
    if target:
        target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    else:
        sys.stdout.write("\n".join(lines) + "\n")


def _generation_config(args: GenerationArguments, model: torch.nn.Module) -> GenerationConfig:
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if {"temperature", "top_k", "top_p", "min_p"} & set(given) and "num_beams" not in given:
        given.setdefault("do_sample", True)  # they mean nothing otherwise
    config = model.generation_config
    config.update(max_new_tokens=args.max_new_tokens, **given)
    config.validate()
    return config


def _read_prompts(path: str) -> list[str]:
    try:
        prompts = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(f"`prompt_file` {path!r} does not exist.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`prompt_file` {path!r} is not UTF-8 text (near byte {error.start}).") from error
    if not prompts:
        raise ValueError(f"`prompt_file` {path!r} holds no prompt.")
    return prompts


if __name__ == "__main__":
    main()
