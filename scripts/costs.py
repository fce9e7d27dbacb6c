#!/usr/bin/env python
"""Writes what each model size costs to train into docs/scale.md: operations that are counted, hours that are computed.

python scripts/costs.py

The operations of a training step are counted by torch while the step runs on tensors without data; hours are these
operations at a stated share of a card's peak. No card is timed.
"""

from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_relpos import RelPosConfig, RelPosForCausalLM
from hf_relpos.cli import command
from hf_relpos.environment import replace_marked
from hf_relpos.model.configuration_relpos import MODEL_SIZES
from hf_relpos.results.result_file import markdown


PAGE = Path(__file__).parent.parent / "docs" / "scale.md"
BEGIN, END = "<!-- costs: made by scripts/costs.py -->", "<!-- end -->"
PEAK = 989e12  # dense bf16 operations per second of an H100 SXM, by its data sheet
SHARE = 0.3  # of the peak, on one card
SHORTEST_STEP = 0.015  # seconds: a step of the Trainer starts some hundred kernels from Python, whatever they compute
EFFICIENCY = {1: 1.0, 8: 0.92, 64: 0.85}  # of data parallelism
LENGTH, STEPS = 128, 10_000
TOKENS_PER_STEP, LARGE_STEP = 128 * 128, 4096 * 128  # of the recipe; of a run that many cards share


def operations_per_token(size: str, length: int) -> tuple[int, float]:
    """→ (parameters, multiplications and additions of a training step per token)."""
    with torch.device("meta"):
        model = RelPosForCausalLM(RelPosConfig.from_size(size, pos_embedding_type="none", attn_implementation="eager"))
        tokens = torch.zeros(2, length, dtype=torch.long)  # shape alone
    with FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, use_cache=False).logits.sum().backward()
    return sum(parameter.numel() for parameter in model.parameters()), counter.get_total_flops() / tokens.numel()


def time_text(operations: float, steps: float, cards: int) -> str:
    """The time of so many operations in so many steps, as a table shows it."""
    seconds = max(operations / (PEAK * SHARE * EFFICIENCY[cards] * cards), steps * SHORTEST_STEP)
    return f"{seconds / 3600:.2f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def costs_table() -> str:
    """A row for each size: the recipe's run, and one of 20 tokens per parameter."""
    cards = [f"{count} GPU{'s' * (count > 1)}" for count in EFFICIENCY]
    rows = [["size", "parameters", "operations per token", "tokens", *cards]]
    for size in MODEL_SIZES:
        parameters, operations = operations_per_token(size, LENGTH)
        for tokens, of_a_step in ((TOKENS_PER_STEP * STEPS, TOKENS_PER_STEP), (20 * parameters, LARGE_STEP)):
            times = [time_text(operations * tokens, tokens / of_a_step, count) for count in EFFICIENCY]
            row = [size, f"{parameters / 1e6:.1f}M", f"{operations / 1e6:.0f}M", f"{tokens / 1e6:,.0f}M", *times]
            rows.append(row)
    return markdown(rows)


@command
def main() -> None:
    replace_marked(PAGE, BEGIN, END, costs_table())
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
