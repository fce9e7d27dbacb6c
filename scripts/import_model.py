#!/usr/bin/env python
"""Makes a pretrained model of another family into one of this: the same logits, with the position scheme a field.

python scripts/import_model.py HuggingFaceTB/SmolLM2-135M output/smollm2
"""

from hf_relpos.pretrained.commands import import_main as main


if __name__ == "__main__":
    main()
