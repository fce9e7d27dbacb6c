#!/usr/bin/env python
"""A page in the browser for saved models: their text side by side, the loss by position as a difference to the first
model, the attention of a head by distance, and the learned bias.

python scripts/demo.py output/alibi output/rotary
"""

from hf_relpos.demo.command import main


if __name__ == "__main__":
    main()
