#!/bin/sh
# The whole notebook on the GPUs of this machine: trains, evaluates and reports; a second call goes on where the first stopped.
#   sh scripts/notebook_gpu.sh                           four runs at once
#   RUNS=2 sh scripts/notebook_gpu.sh --scale 0.0001     a trial of every part, one step a run: 42 minutes on two CPU cores
set -e
hf-relpos sweep --experiment experiments/notebook_gpu.yaml --output_dir output/notebook --num_parallel "${RUNS:-4}" "$@"
hf-relpos report --sweep output/notebook --output_dir output/notebook/report --title "The notebook"
