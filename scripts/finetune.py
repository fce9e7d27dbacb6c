#!/usr/bin/env python
"""Continues with a saved model of the family at another length or with another position scheme.

python scripts/finetune.py --model_name_or_path output/alibi --block_size 512 --output_dir output/512
"""

from hf_relpos.training.commands import finetune_main as main


if __name__ == "__main__":
    main()
