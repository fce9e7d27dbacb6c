#!/usr/bin/env python
"""Goes on with a saved model of the family at another length or with another position scheme.

python scripts/finetune.py --model_name_or_path output/alibi --block_size 512 --output_dir output/512
"""

from hf_relpos.cli import command, parse_arguments
from hf_relpos.data.corpus import DataArguments
from hf_relpos.training.scheme_change import ChangeArguments
from hf_relpos.training.train import FinetuningArguments, finetune


@command
def main() -> None:
    finetune(*parse_arguments((ChangeArguments, DataArguments, FinetuningArguments), __doc__))


if __name__ == "__main__":
    main()
