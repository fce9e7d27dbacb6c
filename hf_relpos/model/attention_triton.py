"""Attention with a bias that depends on the distance alone, by Triton kernels, with memory linear in the length.

The kernels are tiled as FlashAttention-2 (Dao 2023, arXiv 2307.08691) is; each tile of scores reads the biases of its
diagonals from a strip, the (H, L) table in units of ln 2. The gradient of the table is the sum of the scores' gradients
along the diagonals.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, L length of the
table, S length of a strip.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from transformers.utils import logging

from .attention_kernel import TableCall, TableKernel
from .attention_torch import block_backward, block_forward
from .attention_triton_backward import delta_kernel, key_value_kernel, query_kernel, table_kernel
from .attention_triton_sizes import LARGEST_HEAD, Tiles, precision_of, shared_memory, tiles_for
from .attention_triton_tiles import forward_kernel, triton
from .functional_transforms import is_tracing


logger = logging.get_logger(__name__)

LOG2_E = 1.4426950408889634
# how far before and behind the distances of a call its tiles may reach
ROOM = 256
# programs that keep a large GPU busy; the kernel of the table's gradient is split until there are so many
NUM_PROGRAMS = 1024
DELTA_TILES = Tiles(32, 1, 4, 1)


class _Launch:
    """What all kernels of one attention share: tensors, strides, sizes and what their code depends on."""

    def __init__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
    ) -> None:
        self.call, self.device = call, query.device
        self.batch_size, self.num_heads, self.query_length, head_dim = query.shape
        self.num_groups, self.num_keys = key.shape[1:3]
        self.query, self.key, self.value = map(_with_dense_rows, (query, key, value))
        self.strip, self.zero = self._strip(bias_table)
        mask = self._rows_of_keys(call.key_mask, torch.int8)
        documents = self._rows_of_keys(call.documents, torch.int32)
        self.tensors = (self.query, self.key, self.value, self.strip, mask[0], documents[0])
        self.row_strides = (mask[1], documents[1])
        group_size = self.num_heads // self.num_groups
        lengths = (self.query_length, self.num_keys, self.strip.shape[1], call.offset, self.zero + call.offset)
        self.sizes = (self.num_heads, group_size, *lengths, call.scaling * LOG2_E)
        is_interpreted = query.device.type == "cpu"
        self.precision = precision_of(query)
        self.flags = {
            "IS_CAUSAL": call.is_causal,
            "HAS_MASK": call.key_mask is not None,
            "HAS_DOCUMENTS": call.documents is not None,
            "WINDOW": call.window or 0,
            "PRECISION": "tf32" if self.precision == "tf32" else "ieee",
            # the interpreter, which runs on CPUs, has no instructions of a GPU and multiplies no bf16
            "PTX": not is_interpreted,
            "WIDEN": is_interpreted,
            "D": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        }

    def _strip(self, bias_table: torch.Tensor) -> tuple[torch.Tensor, int]:
        """→ (H, S) biases in units of ln 2 at the signed distances, from −zero on, and zero; 0 outside of the table."""
        num_seen = min(self.call.offset + self.query_length, bias_table.shape[1])
        num_behind = 0 if self.call.is_causal else max(self.num_keys - 1 - self.call.offset, 0)
        zero = ROOM + num_behind
        strip = bias_table.new_zeros(self.num_heads, zero + num_seen + ROOM)
        strip[:, zero : zero + num_seen] = bias_table[:, :num_seen] * LOG2_E
        if num_behind:
            strip[:, ROOM:zero] = bias_table[:, 1 : num_behind + 1].flip(1) * LOG2_E
        return strip, zero

    def _rows_of_keys(self, rows: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, int]:
        """→ (B or 1, K) contiguous and its stride for the batch."""
        if rows is None:
            return self.strip, 0  # a pointer that is not read
        rows = rows.to(dtype).contiguous()
        return rows, 0 if rows.shape[0] == 1 else rows.stride(0)

    def num_programs(self, length: int, block: int, num_heads: int) -> int:
        """Of a kernel that has one for each block of a row, head and row of the batch."""
        return triton.cdiv(length, block) * num_heads * self.batch_size

    def run(self, kernel: Any, prepare: Callable[[Tiles], tuple[int, tuple]], **flags: Any) -> None:
        """Runs a kernel with the first tiles that the card has room for.

        Args:
            prepare: tiles → number of programs and arguments.
            flags: constants of the kernel beside those that all have.

        Raises:
            Exception: of Triton, if the kernel cannot be compiled or launched.
        """
        name = "query_and_table_kernel" if flags.get("ADD_TABLE") else kernel.__name__
        *preferred, last = tiles_for(name, self.precision, self.flags["BLOCK_D"], shared_memory(self.device))
        for tiles in preferred:
            try:
                return self._run(kernel, tiles, prepare, flags)
            except triton.runtime.errors.OutOfResources:
                continue  # compiled by another Triton than the sizes were chosen with
        return self._run(kernel, last, prepare, flags)

    def _run(
        self, kernel: Any, tiles: Tiles, prepare: Callable[[Tiles], tuple[int, tuple]], flags: dict[str, Any]
    ) -> None:
        num_programs, arguments = prepare(tiles)
        if kernel is table_kernel:
            blocks = {"BLOCK": tiles.queries}
        else:
            blocks = {"BLOCK_Q": tiles.queries, "BLOCK_K": tiles.keys}
        with self.on_device():
            kernel[(num_programs,)](*arguments, **self.flags, **flags, **blocks, **tiles.options())

    def on_device(self) -> Any:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()


def _with_dense_rows(x: torch.Tensor) -> torch.Tensor:
    """x itself, unless the numbers of a token lie apart, or the rows of a tile farther than 32 bits count."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**23 else x.contiguous()


def _strides(*tensors: torch.Tensor) -> tuple[int, ...]:
    """Those of the batch, the heads and the tokens."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def _like_layers(x: torch.Tensor) -> torch.Tensor:
    """(B, H, N, D), the heads of a token beside each other."""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)


def triton_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    call: TableCall,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (B, H, Q, D) in the dtype of `query` and the (B, H, Q) fp32 logarithms of the sums of exponentials.

    Arguments as in `TableKernel.forward`.
    """
    launch = _Launch(query, key, value, bias_table, call)
    out, lse = _like_layers(query), query.new_empty(query.shape[:3], dtype=torch.float32)
    strides = (*_strides(launch.query, launch.key, launch.value, out), *launch.row_strides)

    def prepare(tiles: Tiles) -> tuple[int, tuple]:
        num_programs = launch.num_programs(launch.query_length, tiles.queries, launch.num_heads)
        return num_programs, (*launch.tensors, out, lse, *strides, *launch.sizes)

    launch.run(forward_kernel, prepare)
    return out, lse


def triton_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias_table: torch.Tensor,
    call: TableCall,
    is_deterministic: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of query, key, value and `bias_table`. Arguments as in `triton_forward`.

    Args:
        is_deterministic: whether the table's gradient is summed in a fixed order, by a separate kernel, instead of by
            atomic additions.
    """
    launch = _Launch(query, key, value, bias_table, call)
    grad_out = _with_dense_rows(grad_out)
    tensors = (*launch.tensors, grad_out, *_row_numbers(launch, out, grad_out, lse))
    strides = (*_strides(launch.query, launch.key, launch.value, grad_out), *launch.row_strides)
    grad_query, grad_key, grad_value = map(_like_layers, (query, key, value))
    grad_strip = launch.strip if is_deterministic else torch.zeros_like(launch.strip)

    def prepare_keys(tiles: Tiles) -> tuple[int, tuple]:
        num_programs = launch.num_programs(launch.num_keys, tiles.keys, launch.num_groups)
        gradients = (grad_key, grad_value)
        return num_programs, (*tensors, *gradients, *strides, *_strides(*gradients), *launch.sizes, call.scaling)

    def prepare_queries(tiles: Tiles) -> tuple[int, tuple]:
        num_programs = launch.num_programs(launch.query_length, tiles.queries, launch.num_heads)
        gradients = (grad_query, grad_strip)
        return num_programs, (*tensors, *gradients, *strides, *_strides(grad_query), *launch.sizes, call.scaling)

    launch.run(key_value_kernel, prepare_keys, IS_GROUPED=launch.num_groups < launch.num_heads)
    launch.run(query_kernel, prepare_queries, ADD_TABLE=not is_deterministic)
    if is_deterministic:
        grad_table = _table_gradient(launch, tensors, strides, bias_table.shape[1])
    else:
        grad_table = _fold(grad_strip, -launch.zero, bias_table.shape[1])
    return grad_query, grad_key, grad_value, grad_table


def _row_numbers(
    launch: _Launch, out: torch.Tensor, grad_out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (B, H, Q) fp32, twice: `lse` in units of ln 2; delta, the products of the rows of `out` and its gradient."""
    out = _with_dense_rows(out)
    lse_2, delta = out.new_empty(2, *out.shape[:3], dtype=torch.float32)
    num_programs = launch.num_programs(launch.query_length, DELTA_TILES.queries, launch.num_heads)
    sizes = {name: launch.flags[name] for name in ("D", "BLOCK_D")}
    with launch.on_device():
        delta_kernel[(num_programs,)](
            out,
            grad_out,
            lse.contiguous(),
            lse_2,
            delta,
            *_strides(out, grad_out),
            launch.num_heads,
            launch.query_length,
            **sizes,
            BLOCK_Q=DELTA_TILES.queries,
            **DELTA_TILES.options(),
        )
    return lse_2, delta


def _table_gradient(
    launch: _Launch, tensors: tuple[torch.Tensor, ...], strides: tuple[int, ...], length: int
) -> torch.Tensor:
    """→ (H, L): a kernel sums the tiles of each diagonal of tiles, and along their diagonals; the rest is here."""
    made: dict[str, Any] = {}

    def prepare(tiles: Tiles) -> tuple[int, tuple]:
        block = tiles.queries
        lowest, num_diagonals = _diagonals(launch, block)
        num_rows, num_columns = triton.cdiv(launch.query_length, block), triton.cdiv(launch.num_keys, block)
        shares = triton.cdiv(NUM_PROGRAMS, num_diagonals * launch.num_heads)
        shares = min(shares, launch.batch_size * min(num_rows, num_columns))
        sums = tensors[-1].new_empty(num_diagonals, launch.num_heads, shares, 2, block)
        made.update(sums=sums, first=launch.call.offset + (lowest - 1) * block + 1)
        numbers = (launch.batch_size, lowest, num_diagonals, shares)
        return num_diagonals * launch.num_heads * shares, (*tensors, sums, *strides, *launch.sizes, *numbers)

    launch.run(table_kernel, prepare)
    # (H, diagonals, 2, block), distances growing by one; the second half of one diagonal is where the next begins
    sums = made["sums"].sum(2).transpose(0, 1).flip(-1)
    signed = torch.nn.functional.pad(sums[:, :, 0], (0, 0, 0, 1))
    signed[:, 1:] += sums[:, :, 1]
    return _fold(signed.flatten(1), made["first"], length)


def _diagonals(launch: _Launch, block: int) -> tuple[int, int]:
    """→ the lowest row block − key block of tiles that hold a distance of the call, and how many from it on do."""
    offset, window = launch.call.offset, launch.flags["WINDOW"]
    lowest = 1 - triton.cdiv(launch.num_keys, block)
    if launch.call.is_causal:  # those with a distance of 0 or more
        lowest = max(lowest, -((offset + block - 1) // block))
    highest = triton.cdiv(launch.query_length, block) - 1
    if window:  # a tile's least distance is offset + block · diagonal − (block − 1)
        highest = min(highest, (window - offset + 2 * block - 2) // block - 1)
    return lowest, highest + 1 - lowest


def _fold(signed: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """(H, n) gradients at the distances from `first` on → (H, length), those of negative distances added to theirs."""
    folded = signed.new_zeros(signed.shape[0], length)
    ahead = signed[:, max(-first, 0) :][:, : length - max(first, 0)]
    folded[:, max(first, 0) :][:, : ahead.shape[1]] = ahead
    if first < 0:
        later = signed[:, :-first].flip(1)[:, : length - 1]  # distances −1, −2, ..
        folded[:, 1 : later.shape[1] + 1] += later
    return folded


# --- where they serve


# device, dtype and head size → why the kernels could not be compiled or launched for them
_FAILED: dict[tuple[torch.device, torch.dtype, int], str] = {}


class TritonKernel(TableKernel):
    """The kernels of these files, on an NVIDIA GPU where Triton can compile them."""

    name = "triton"

    @staticmethod
    def supports(query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall) -> bool:
        if not query.is_cuda or query.dtype == torch.float64:
            return False
        if not _card_is_served(query.device.index):
            return False
        if query.shape[3] > LARGEST_HEAD:
            return _say(f"their head size is at most {LARGEST_HEAD}")
        return is_tracing(query) or _key(query) not in _FAILED

    @staticmethod
    def forward(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias_table: torch.Tensor, call: TableCall
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _or_blocks(triton_forward, block_forward, query, (query, key, value, bias_table, call))

    @staticmethod
    def backward(
        grad_out: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        bias_table: torch.Tensor,
        call: TableCall,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        arguments = (grad_out, query, key, value, out, lse, bias_table, call)
        return _or_blocks(triton_backward, block_backward, query, arguments)


@torch.compiler.assume_constant_result
def _card_is_served(device_index: int) -> bool:
    """Whether the kernels are for a GPU; if not, says once why."""
    if triton is None:
        return _say("Triton is not installed")
    if torch.version.hip is not None or torch.cuda.get_device_capability(device_index) < (8, 0):
        name = torch.cuda.get_device_name(device_index)
        return _say(f"they need an NVIDIA GPU of compute capability 8.0 or more, not {name}")
    return True


@torch.compiler.assume_constant_result
def _say(reason: str) -> bool:
    """Says once why the kernels do not serve."""
    logger.warning_once(f"Attention with a bias runs in operations of torch, not by its faster kernels: {reason}.")
    return False


def _key(query: torch.Tensor) -> tuple[torch.device, torch.dtype, int]:
    return query.device, query.dtype, query.shape[3]


def _or_blocks(run: Callable, run_blocks: Callable, query: torch.Tensor, arguments: tuple) -> Any:
    """The kernels, or blocks in operations of torch where they cannot be compiled or launched, which is said once."""
    key = _key(query)
    if key not in _FAILED:
        try:
            return run(*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what compilers, drivers and full disks raise
            _FAILED[key] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _say(_FAILED[key])
    return run_blocks(*arguments)
