#!/usr/bin/env python
"""Writes a model with rotary positions as a `LlamaForCausalLM`, which other programs serve.

python scripts/export_model.py output/yarn output/yarn-llama
"""

from hf_relpos.pretrained.commands import export_main as main


if __name__ == "__main__":
    main()
