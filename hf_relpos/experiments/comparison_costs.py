"""What the schemes of a comparison cost on this machine: steps that are timed, and kept for some minutes."""

import hashlib
import json
import time
from contextlib import suppress
from pathlib import Path

import torch

from ..environment import write_json
from ..model.configuration_relpos import RelPosConfig
from ..training.model_setup import new_model


MEASURED = "measured.json"  # in the folder of the comparison
KEPT = 1200  # seconds that what was measured holds for: a budget that was named is asked about with the same numbers
WARM_UP, FEWEST, MOST, ENOUGH = 2, 5, 15, 1.5  # steps before the timed ones; timed ones; seconds of these


def measure(config: RelPosConfig, batch_size: int, length: int, device: str, bf16: bool) -> float:
    """Seconds of a training step with a model of this configuration: the middle one of 5 to 15, after two to warm
    up."""
    model = new_model(config, 0).to(device).train()
    model.skip_logits = True
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = torch.randint(config.vocab_size, (batch_size, length), device=device)
    times: list[float] = []
    while len(times) < WARM_UP + FEWEST or (len(times) < WARM_UP + MOST and sum(times[WARM_UP:]) < ENOUGH):
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
    timed = sorted(times[WARM_UP:])
    return timed[len(timed) // 2]


def kept_measure(
    root: Path, config: RelPosConfig, batch_size: int, length: int, device: str, bf16: bool, num_threads: int
) -> float:
    """As `measure`, or what it found for the same not long ago, which is kept in a folder.

    Args:
        root: the folder.
        config, batch_size, length, device, bf16: as for `measure`.
        num_threads: that it has.
    """
    facts = [config.to_json_string(), batch_size, length, device, bf16, num_threads]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    found = _read(root / MEASURED)
    if key not in found:
        found[key] = [time.time(), measure(config, batch_size, length, device, bf16)]
        write_json(root / MEASURED, found)
    return found[key][1]


def _read(path: Path) -> dict[str, list[float]]:
    """What is not too old; a file that cannot be read holds nothing."""
    with suppress(OSError, ValueError, TypeError, AttributeError):
        content = json.loads(path.read_text(encoding="utf-8"))
        now = time.time()
        return {key: [when, float(seconds)] for key, (when, seconds) in content.items() if 0 <= now - when < KEPT}
    return {}
