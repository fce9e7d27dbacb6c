"""`hf-relpos evaluate`: its flags, and what it prints. The rest is imported when the flags were read, so that `--help`
does not wait for it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..cli import command, parse_arguments, say_next
from ..tasks.arguments import DataArguments


DESCRIPTION = """\
Evaluates any causal language model of transformers by length and by position, over the same target tokens; or by the
rows of a synthetic task (--task).

hf-relpos evaluate --model_name_or_path output/alibi --eval_lengths 128 512 2048 --output_dir output/eval
"""
USUAL = (
    "model_name_or_path",
    "output_dir",
    "eval_lengths",
    "max_windows",
    "eval_split",
    "validation_file",
    "test_file",
)
USUAL += ("stride", "dtype", "task")


@dataclass
class EvaluationArguments:
    """What to evaluate, and how."""

    about: ClassVar[str] = "the evaluation"

    model_name_or_path: str = field(metadata={"help": "A causal language model, of this family or any other."})
    output_dir: str = field(metadata={"help": "Folder for results.json and the plots."})
    eval_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Evaluation lengths in tokens; by default 128 256 512 1024, or up to 8 times a shorter training "
            "length, as far as the documents and a learned table go."
        },
    )
    eval_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on; by default test if there is one, else validation."}
    )
    stride: int | None = field(
        default=None,
        metadata={
            "help": "Also compute the sliding-window perplexity of the whole split, at each length above this stride."
        },
    )
    sliding_baseline: bool = field(
        default=False,
        metadata={
            "help": "Also read the same windows in rows of the training length that move by its half: what the model "
            "makes of the same tokens without reading past the length that it was trained at."
        },
    )
    train_length: int | None = field(
        default=None, metadata={"help": "Length the model was trained at, if its configuration does not say it."}
    )
    tokens_per_batch: int = field(default=8192, metadata={"help": "Tokens of one forward."})
    max_windows: int | None = field(
        default=None,
        metadata={
            "help": "Windows of the longest length to read, spread evenly; all by default. Of a task, rows of each "
            "length and kind; 100 by default."
        },
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa or another of the model's."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float16."})


@command
def main() -> None:
    """The command line of scripts/evaluate.py."""
    types = (EvaluationArguments, DataArguments)
    args, data_args = parse_arguments(types, DESCRIPTION, usual=USUAL, required=USUAL[:2])
    from ..results.groups import setting_label
    from ..results.result_file import context_notes, corpus_note, markdown_table, ratio_notes, split_name
    from .evaluate import evaluate_model

    result = evaluate_model(args, data_args)
    results, names = [result], [setting_label(result)]  # a row says what is scaled, as in reports
    notes = [*ratio_notes(results), *context_notes(results), corpus_note(results, names)]
    print("\n".join([markdown_table(results, names), *notes]))
    print(_read_text(result))
    if row := result.get("sliding_baseline"):
        text = f"by a sliding window of {row['length']}, the training length, on the same tokens"
        print(f"{text}: perplexity {row['perplexity']:.2f}")
    for length, row in result.get("sliding_window", {}).items():
        tokens = row["num_tokens"]
        print(f"sliding window of {length} by {args.stride}: perplexity {row['perplexity']:.2f} on {tokens} tokens")
    for path in (*sorted(Path(args.output_dir).glob("*_by_*.png")), Path(args.output_dir) / "results.json"):
        print(f"wrote {path}: {split_name(result)}")
    if "task" in result:
        say_next("report", results=Path(args.output_dir) / "results.json", output_dir=Path(args.output_dir) / "report")
        return
    trained_on = (result["training"] or {}).get("corpus") or {}
    say_next("generate", model_name_or_path=args.model_name_or_path, prompt=trained_on.get("opening") or "The")


def _read_text(result: dict[str, Any]) -> str:
    """How much was read."""
    corpus, lengths = result["corpus"], [*result["lengths"]]
    if "task" in result:
        return f"Read: {corpus['num_windows']:,} rows of each kind, at {', '.join(lengths)} tokens."
    windows = f"{corpus['num_windows']:,} windows of {int(lengths[-1]):,} tokens"
    return f"Read: {windows} from {corpus['num_documents']:,} documents, at {', '.join(lengths)} tokens."
