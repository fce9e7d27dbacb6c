"""How large the tiles of the Triton kernels are, by what a card has room for.

The sizes are fixed, not timed on the card that runs them: other tiles add in another order, and two runs would differ
in their last bits. `python -m benchmarks.triton_compile` compiles all of them for all cards and counts registers,
spills, shared memory and instructions.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch


# bytes of shared memory that one program may take, by compute capability
SMALL, MEDIUM, LARGE = 101_376, 166_912, 232_448
SHARED_MEMORY = {80: MEDIUM, 86: SMALL, 89: SMALL, 90: LARGE, 120: SMALL}
LARGEST_HEAD = 256


@dataclass(frozen=True)
class Tiles:
    """The tiles that a program of a kernel works on.

    Attributes:
        queries, keys: rows and columns of a tile; equal in the kernel of the table's gradient.
        warps: groups of 32 threads of a program.
        stages: tiles whose keys and values, or queries and gradients, are in shared memory at the same time.
    """

    queries: int
    keys: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """What a launch takes beside the sizes of the tile."""
        # products that are added at once are rounded once: said here, since Triton changes what it takes for granted
        return {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}


# kernel → precision and head size, rounded up → shared memory that is needed → tiles. 16 takes the tiles of 32. Those
# of LARGE have the 64 rows or more that the tensor cores of Hopper (wgmma) take at once, as far as registers suffice
TILES: dict[str, dict[tuple[str, int], dict[int, Tiles]]] = {
    "forward_kernel": {
        ("half", 32): {SMALL: Tiles(128, 64, 8, 2)},
        ("half", 64): {SMALL: Tiles(128, 64, 8, 2)},
        ("half", 128): {SMALL: Tiles(128, 64, 8, 2)},
        ("half", 256): {SMALL: Tiles(64, 32, 8, 2), LARGE: Tiles(128, 32, 8, 2)},
        ("tf32", 32): {SMALL: Tiles(128, 32, 8, 2)},
        ("tf32", 64): {SMALL: Tiles(64, 32, 4, 2)},
        ("tf32", 128): {SMALL: Tiles(64, 32, 8, 1)},
        ("tf32", 256): {SMALL: Tiles(32, 16, 8, 1)},
        ("ieee", 32): {SMALL: Tiles(64, 32, 8, 1)},
        ("ieee", 64): {SMALL: Tiles(64, 32, 8, 1)},
        ("ieee", 128): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 256): {SMALL: Tiles(16, 16, 8, 1)},
    },
    "key_value_kernel": {
        ("half", 32): {SMALL: Tiles(64, 64, 4, 2)},
        ("half", 64): {SMALL: Tiles(32, 64, 4, 2), LARGE: Tiles(64, 64, 4, 2)},
        ("half", 128): {SMALL: Tiles(32, 32, 4, 2), LARGE: Tiles(32, 64, 4, 1)},
        ("half", 256): {SMALL: Tiles(32, 32, 8, 1)},
        ("tf32", 32): {SMALL: Tiles(32, 64, 4, 2)},
        ("tf32", 64): {SMALL: Tiles(32, 32, 4, 1)},
        ("tf32", 128): {SMALL: Tiles(16, 32, 8, 1)},
        ("tf32", 256): {SMALL: Tiles(16, 16, 8, 1)},
        ("ieee", 32): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 64): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 128): {SMALL: Tiles(16, 32, 8, 1)},
        ("ieee", 256): {SMALL: Tiles(16, 16, 8, 1)},
    },
    "query_kernel": {
        ("half", 32): {SMALL: Tiles(64, 64, 4, 2)},
        ("half", 64): {SMALL: Tiles(64, 32, 4, 2), LARGE: Tiles(64, 64, 4, 2)},
        ("half", 128): {SMALL: Tiles(64, 32, 8, 2), LARGE: Tiles(64, 32, 4, 2)},
        ("half", 256): {SMALL: Tiles(32, 32, 8, 1)},
        ("tf32", 32): {SMALL: Tiles(64, 32, 4, 2)},
        ("tf32", 64): {SMALL: Tiles(32, 32, 4, 1)},
        ("tf32", 128): {SMALL: Tiles(32, 16, 8, 1)},
        ("tf32", 256): {SMALL: Tiles(16, 16, 8, 1)},
        ("ieee", 32): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 64): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 128): {SMALL: Tiles(32, 16, 8, 1)},
        ("ieee", 256): {SMALL: Tiles(16, 16, 8, 1)},
    },
    "table_kernel": {
        ("half", 32): {SMALL: Tiles(64, 64, 4, 2)},
        ("half", 64): {SMALL: Tiles(64, 64, 8, 2), LARGE: Tiles(64, 64, 4, 1)},
        ("half", 128): {SMALL: Tiles(32, 32, 4, 2), LARGE: Tiles(64, 64, 8, 2)},
        ("half", 256): {SMALL: Tiles(32, 32, 8, 2), LARGE: Tiles(64, 64, 8, 1)},
        ("tf32", 32): {SMALL: Tiles(64, 64, 8, 1)},
        ("tf32", 64): {SMALL: Tiles(32, 32, 4, 1)},
        ("tf32", 128): {SMALL: Tiles(32, 32, 8, 1)},
        ("tf32", 256): {SMALL: Tiles(16, 16, 8, 1)},
        ("ieee", 32): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 64): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 128): {SMALL: Tiles(32, 32, 8, 1)},
        ("ieee", 256): {SMALL: Tiles(16, 16, 8, 1)},
    },
}
# with the gradient of the table beside that of the queries
TILES["query_and_table_kernel"] = TILES["query_kernel"] | {("half", 64): {SMALL: Tiles(64, 32, 4, 2)}}


def tiles_for(kernel: str, precision: str, block_d: int, available: int) -> list[Tiles]:
    """The tiles of a kernel that fit into `available` bytes of shared memory, the largest first; the smallest at least.

    Args:
        kernel: a key of `TILES`.
        precision: as `precision_of` gives it.
        block_d: the head size, rounded up to a power of 2, at most 256.
    """
    by_memory = TILES[kernel][precision, max(block_d, 32)]
    needs = sorted(by_memory, reverse=True)
    return [by_memory[need] for need in needs if need <= available] or [by_memory[needs[-1]]]


def precision_of(x: torch.Tensor) -> str:
    """How products are computed: "half" in bf16 and fp16; in fp32 "tf32" where torch's own may be
    (`torch.set_float32_matmul_precision`), else "ieee", without tensor cores."""
    if x.dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may take; where the interpreter runs, those of the smallest card."""
    return _shared_memory(device.index) if device.type == "cuda" else SMALL


@functools.cache
def _shared_memory(device_index: int | None) -> int:
    properties = torch.cuda.get_device_properties(device_index)
    return getattr(properties, "shared_memory_per_block_optin", SMALL)
