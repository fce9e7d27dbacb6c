#!/usr/bin/env python
"""Goes on with a saved model of the family at a longer context.

python scripts/finetune.py --model_name_or_path output/alibi --block_size 512 --output_dir output/512
"""

from hf_relpos.cli import command, parse_arguments
from hf_relpos.data import DataArguments
from hf_relpos.saved_models import SavedModelArguments
from hf_relpos.training import FinetuningArguments, finetune


@command
def main() -> None:
    finetune(*parse_arguments((SavedModelArguments, DataArguments, FinetuningArguments), __doc__))


if __name__ == "__main__":
    main()
