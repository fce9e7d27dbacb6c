#!/usr/bin/env python
"""Runs the experiment that a YAML file states, and continues where an earlier call stopped.

python scripts/sweep.py --experiment experiments/relative_schemes.yaml --output_dir output/relative --scale 0.01
"""

from hf_relpos.experiments.commands import sweep_main as main


if __name__ == "__main__":
    main()
