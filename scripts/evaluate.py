#!/usr/bin/env python
"""Evaluates any causal language model of transformers by length and by position, over the same target tokens; or by the
rows of a synthetic task (--task).

python scripts/evaluate.py --model_name_or_path output/alibi --eval_lengths 128 512 2048 --output_dir output/eval
"""

from hf_relpos.evaluation.command import main


if __name__ == "__main__":
    main()
