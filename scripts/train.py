#!/usr/bin/env python
"""Trains a model of the family from scratch, or goes on with a saved one at the same length.

python scripts/train.py --pos_embedding_type alibi --output_dir output/alibi
"""

from hf_relpos.cli import command, parse_arguments
from hf_relpos.data.corpus import DataArguments
from hf_relpos.training.model_setup import ModelArguments
from hf_relpos.training.train import RelPosTrainingArguments, train


@command
def main() -> None:
    train(*parse_arguments((ModelArguments, DataArguments, RelPosTrainingArguments), __doc__))


if __name__ == "__main__":
    main()
