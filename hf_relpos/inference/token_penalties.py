"""What OpenAI's requests call `frequency_penalty` and `presence_penalty`: transformers' server takes the first for a
`repetition_penalty`, which divides scores and counts the prompt, and the second for nothing."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList


PENALTIES = ("frequency_penalty", "presence_penalty")


class TokenPenalties(LogitsProcessor):
    """Takes off the score of each token that was generated before: so much for each time, and so much once.

    Source: OpenAI's reference of completions, "frequency_penalty" and "presence_penalty".

    Args:
        prompt_length: tokens of the prompt, which do not count.
        frequency: for each time, -2 to 2.
        presence: once, -2 to 2.
    """

    def __init__(self, prompt_length: int, frequency: float, presence: float) -> None:
        self.prompt_length, self.frequency, self.presence = prompt_length, frequency, presence

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """(B, K) tokens so far, (B, V) scores → (B, V) scores."""
        generated = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self.frequency * counts - self.presence * (counts > 0)


def with_penalties(inputs: Mapping[str, Any], penalties: Mapping[str, float]) -> dict[str, Any]:
    """→ the arguments of `generate`, with the penalties of a request if it has any."""
    values = [float(penalties.get(name, 0)) for name in PENALTIES]
    if not any(values):
        return dict(inputs)
    processor = TokenPenalties(inputs["input_ids"].shape[-1], *values)
    return {**inputs, "logits_processor": LogitsProcessorList([processor])}
