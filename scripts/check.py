#!/usr/bin/env python
"""Tries position schemes on a tiny model, in seconds: causality, padding, batches, caches, packing, gradients, saving.

python scripts/check.py my_scheme.py
"""

from hf_relpos.check_command import main


if __name__ == "__main__":
    main()
