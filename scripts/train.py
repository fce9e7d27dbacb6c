#!/usr/bin/env python
"""Trains a model of the family from scratch, or continues with a saved one at the same length.

python scripts/train.py --pos_embedding_type alibi --output_dir output/alibi
"""

from hf_relpos.training.commands import train_main as main


if __name__ == "__main__":
    main()
