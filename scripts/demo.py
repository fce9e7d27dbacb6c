#!/usr/bin/env python
"""A page in the browser for saved models: their text side by side, their loss by position, their learned bias.

python scripts/demo.py output/alibi output/rotary
"""

from hf_relpos.demo.command import main


if __name__ == "__main__":
    main()
