"""Dropout in training on CPUs by `hf_relpos.native`. Its mask follows from one seed, which each call draws from torch's
generator, and the place of each number: the backward pass makes it anew, and nothing but the seed is kept.
"""

import functools
from typing import Any

import torch

from .plain_tensors import DTYPES, are_plain, are_plain_numbers


INTERFACE = 1  # of dropout in `hf_relpos.native`, whose version may be another than that of this file
WORD = 2**32 - 1  # the largest of 32 bits
COUNTERS = 16  # of a block, whose 64 numbers take the first word of each, then the second of each, ...


def has_dropout(library: Any | None) -> bool:
    """Whether there is a `hf_relpos.native.Library`, and it has dropout as it is called here."""
    return getattr(library, "dropout_interface", None) == INTERFACE


def is_plain_dropout(x: torch.Tensor, p: float) -> bool:
    """Whether some numbers on a CPU are dropped, in no graph and under no transform. A mode of dispatch sees operations
    of torch, but the same mask: where a checkpoint computes anew there may be another mode than before."""
    return isinstance(p, float) and 0 < p < 1 and are_plain_numbers(x)


def fused_dropout(x: torch.Tensor, p: float, library: Any) -> torch.Tensor:
    """→ what `torch.nn.functional.dropout(x, p)` does, by a library that `has_dropout`; draws one number from torch's
    generator. `x` and `p` are what `is_plain_dropout` allows."""
    seed = torch.empty((), dtype=torch.int64, device="cpu").random_(-(2**63), None).item()
    return _drop(x, seed, p, library)


def _drop(x: torch.Tensor, seed: int, p: float, library: Any) -> torch.Tensor:
    if are_plain_numbers(x):
        return _FusedDropout.apply(x, seed, p, library)
    return x * dropout_factors(x.shape, seed, p, x.dtype, x.device)  # where many gradients are taken at once


class _FusedDropout(torch.autograd.Function):
    """The gradient is dropped as the input was, and so are its derivatives. Transforms of `torch.func` never come
    here."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seed: int, p: float, library: Any) -> torch.Tensor:
        ctx.options = seed, p, library
        if are_plain(x):
            return library.dropout(x, seed, *_threshold_and_scale(p, x.dtype))
        return x * dropout_factors(x.shape, seed, p, x.dtype, x.device)

    @staticmethod
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return _drop(grad_out.contiguous(), *ctx.options), None, None, None


@functools.lru_cache(maxsize=64)
def _threshold_and_scale(p: float, dtype: torch.dtype) -> tuple[int, float]:
    """→ the number of random words that drop, of 2^32, and 1 / (1 - p) as torch rounds it: in bf16 to bf16."""
    return min(round(p * 2**32), WORD), torch.ones(1, dtype=dtype, device="cpu").div_(1 - p).item()


# --- the same in operations of torch, for whoever looks at these, and to check the library with


def dropout_factors(
    shape: torch.Size, seed: int, p: float, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """→ 0 for what is dropped and 1 / (1 - p) for what is kept."""
    threshold, scale = _threshold_and_scale(p, dtype)
    blocks = -(-shape.numel() // (4 * COUNTERS))
    counters = torch.arange(blocks * COUNTERS, device=device)
    zeros = torch.zeros_like(counters)
    words = torch.stack(philox([counters & WORD, counters >> 32, zeros, zeros], (seed & WORD, seed >> 32 & WORD)))
    words = words.view(4, blocks, COUNTERS).transpose(0, 1).flatten()[: shape.numel()].view(shape)
    return (words >= threshold).to(dtype) * scale


def philox(counter: list[torch.Tensor], key: tuple[int, int]) -> list[torch.Tensor]:
    """Philox 4x32-10, of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

    Args:
        counter: four tensors of one shape, the words of the counters, int64 from 0 to 2^32 - 1.
        key: two such words.

    Returns:
        Four tensors of random words.
    """
    a, b, c, d = counter
    first, second = key
    for _ in range(10):
        of_a, of_c = a * 0xD2511F53, c * 0xCD9E8D57  # modulo 2^64, which keeps all bits
        a, b = (of_c >> 32 & WORD) ^ b ^ first, of_c & WORD
        c, d = (of_a >> 32 & WORD) ^ d ^ second, of_a & WORD
        first, second = first + 0x9E3779B9 & WORD, second + 0xBB67AE85 & WORD
    return [a, b, c, d]


def check_dropout(library: Any) -> None:
    """Compares dropout of a library with operations of torch.

    Raises:
        RuntimeError: if a number differs.
    """
    x = torch.randn(3, 777, generator=torch.Generator().manual_seed(0), device="cpu")
    for dtype in DTYPES:
        for seed, p in ((0, 0.5), (0x1234_5678_9ABC_DEF0, 0.1), (-1, 0.9)):
            x = x.to(dtype)
            found = library.dropout(x, seed, *_threshold_and_scale(p, dtype))
            off = float((found - x * dropout_factors(x.shape, seed, p, dtype)).abs().max())
            if off != 0:
                raise RuntimeError(f"it is off by {off:.1e} in the dropout of {dtype}")
