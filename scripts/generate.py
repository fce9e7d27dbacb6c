#!/usr/bin/env python
"""Generates text from a saved model: one prompt streamed to the terminal, or a file of prompts in batches.

python scripts/generate.py --model_name_or_path output/alibi --prompt "Fellow citizens," --max_new_tokens 100
"""

from hf_relpos.inference.command import main


if __name__ == "__main__":
    main()
