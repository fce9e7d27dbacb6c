#!/usr/bin/env python
"""Compares position schemes on a text: a learning rate for each, several seeds, and the answer in words.

python scripts/compare.py --text my_texts/ --schemes rotary alibi linear_cpb --budget 20min
"""

from hf_relpos.experiments.commands import compare_main as main


if __name__ == "__main__":
    main()
