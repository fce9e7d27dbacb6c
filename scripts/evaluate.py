#!/usr/bin/env python
"""Evaluates any causal language model of transformers by length and by position, over the same target tokens; or by the
rows of a synthetic task (--task).

python scripts/evaluate.py --model_name_or_path output/alibi --eval_lengths 128 512 2048 --output_dir output/eval
"""

from pathlib import Path

from hf_relpos.cli import command, parse_arguments
from hf_relpos.evaluation.evaluate import EvaluationArguments, evaluate_model
from hf_relpos.results.result_file import markdown_table
from hf_relpos.tasks.arguments import DataArguments


@command
def main() -> None:
    args, data_args = parse_arguments((EvaluationArguments, DataArguments), __doc__)
    result = evaluate_model(args, data_args)
    print(markdown_table([result]))
    for length, row in result.get("sliding_window", {}).items():
        tokens = row["num_tokens"]
        print(f"sliding window of {length} by {args.stride}: perplexity {row['perplexity']:.2f} on {tokens} tokens")
    for path in (*sorted(Path(args.output_dir).glob("*_by_*.png")), Path(args.output_dir) / "results.json"):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
