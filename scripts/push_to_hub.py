#!/usr/bin/env python
"""Publishes a saved model of the family: weights, code, tokenizer, results and card, in one commit.

python scripts/push_to_hub.py output/alibi alice/relpos-alibi
"""

from hf_relpos.hub.command import main


if __name__ == "__main__":
    main()
