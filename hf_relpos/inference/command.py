"""`hf-relpos generate`: its flags, and what it prints. The rest is imported when the flags were read, so that `--help`
does not wait for it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ..cli import command, parse_arguments, say_next
from ..environment import check_at_least_1, check_room
from ..file_reading import read_json


DESCRIPTION = """\
Generates text from a saved model: one prompt streamed to the terminal, or a file of prompts in batches.

hf-relpos generate --model_name_or_path output/alibi --prompt "Fellow citizens," --max_new_tokens 100
"""

OWN = "the model's own by default"
USUAL = ("model_name_or_path", "prompt", "prompt_file", "output_file", "max_new_tokens", "temperature", "top_p", "seed")


@dataclass
class GenerationArguments:
    """The sampling flags are those of GenerationConfig; what is not given is as the model's generation_config says."""

    about: ClassVar[str] = "the generation"

    model_name_or_path: str = field(metadata={"help": "A causal language model, of this family or any other."})
    prompt: str | None = field(
        default=None,
        metadata={"help": "The text to continue, empty for a new document; this or --prompt_file, without a default."},
    )
    prompt_file: str | None = field(
        default=None, metadata={"help": "A text file with one prompt per line, instead of --prompt; none by default."}
    )
    output_file: str | None = field(
        default=None, metadata={"help": "JSON lines of prompt and text, for --prompt_file; by default the terminal."}
    )
    batch_size: int = field(default=8, metadata={"help": "Prompts generated at a time."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Tokens to generate at most; 100 by default, or fewer where a learned table ends."},
    )
    do_sample: bool | None = field(
        default=None, metadata={"help": f"Sample instead of taking the likeliest token; {OWN}."}
    )
    temperature: float | None = field(
        default=None, metadata={"help": f"Sharpness of sampling, 0 for the likeliest token; {OWN}."}
    )
    top_k: int | None = field(default=None, metadata={"help": f"Sample among the k likeliest tokens; {OWN}."})
    top_p: float | None = field(
        default=None, metadata={"help": f"Sample among tokens of this total probability; {OWN}."}
    )
    min_p: float | None = field(
        default=None, metadata={"help": f"Drop tokens below this share of the likeliest; {OWN}."}
    )
    num_beams: int | None = field(default=None, metadata={"help": f"Beams of beam search; {OWN}."})
    repetition_penalty: float | None = field(
        default=None, metadata={"help": f"Penalty of tokens that occurred; {OWN}."}
    )
    no_repeat_ngram_size: int | None = field(
        default=None, metadata={"help": f"Length of runs that may occur once; {OWN}."}
    )
    seed: int = field(default=42, metadata={"help": f"Seed of sampling; {OWN}."})


@command
def main() -> None:
    """The command line of scripts/generate.py."""
    (args,) = parse_arguments((GenerationArguments,), DESCRIPTION, usual=USUAL, required=USUAL[:2])
    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError("exactly one of --prompt and --prompt_file is needed.")
    check_at_least_1("max_new_tokens", args.max_new_tokens)
    check_at_least_1("batch_size", args.batch_size)
    target = Path(args.output_file) if args.output_file else None
    if target and (args.prompt_file is None or target.exists() or not target.parent.is_dir()):
        raise ValueError(f"`output_file` {args.output_file!r} must be new, in a folder, and needs --prompt_file.")
    if target:
        check_room("output_file", target, 0, "the texts")  # else they were lost at the end
    from .generate import generate

    generate(args)
    config = Path(args.model_name_or_path) / "config.json"
    if config.is_file() and read_json(config).get("model_type") == "relpos":
        name = f"your-name/{config.resolve().parent.name}"
        say_next("push", args.model_name_or_path, name, dry_run="true")
