"""Attention with a bias that depends on the distance alone, in torch operations, with memory linear in the length.

The bias of a block of rows is a window on one strip of the table, so no (Q, K) matrix is ever built: the scores of a
block are computed, used and thrown away, in the backward pass a second time.

Shape letters: B batch, H query heads, G key and value heads, R = H / G, Q query length, K key length, D head size,
L length of the table.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .attention_cpu import CPU_FLASH, is_fast_on_cpu, num_workers, run_in_threads
from .attention_kernel import TableCall, TableKernel


# exp2 is the fast exponential of torch on CPUs: its exp takes several times as long, and far longer where the
# result underflows, as it does for most keys under a steep bias
LOG2_E, LN_2 = math.log2(math.e), math.log(2)
# scores that one thread holds at a time in the backward pass: twice 2 MiB in fp32
CHUNK_SCORES = 2**19
# keys that are taken at a time there
TILE_KEYS = 1024
# past this many keys, forward and backward, the strip is a view of the table and the rows of a block stand in reverse;
# below, turning the rows costs more than a copy of the strip
LONGEST_COPY, LONGEST_COPY_BACKWARD = 1024, 256


@dataclass
class DistanceBias:
    """The bias of any block of rows as a window on a (H, rows, width) tensor that does not depend on the block.

    Row r of a block whose last row stands at slot `end` − 1 sees key slot j at distance end − rows + r − j. With the
    columns counted from the end, c = slots − end + j, that is slots − rows + r − c: the same for all blocks.

    Attributes:
        strip: (H, rows, slots + ahead), the values; −inf where a causal mask or a window hides the key.
        rows: rows of a block; a block of fewer is the end of it.
        slots: slots up to the last query.
        ahead: columns for keys behind the last query, 0 with a causal mask.
        is_reversed: whether the rows of a block stand in reverse: then a view of the table has the rows r + c on its
            diagonals, and nothing is copied.
    """

    strip: torch.Tensor
    rows: int
    slots: int
    ahead: int
    is_reversed: bool

    @classmethod
    def build(
        cls,
        bias_table: torch.Tensor,
        rows: int,
        offset: int,
        slots: int,
        num_keys: int,
        is_causal: bool,
        is_reversed: bool,
        window: int | None,
    ) -> "DistanceBias":
        """From the (H, L) table, for queries at the slots from `offset` to `slots` and keys from 0 to `num_keys`."""
        ahead = 0 if is_causal else max(num_keys - offset, 0)
        past, num_later = bias_table[:, : min(slots, window or slots)].flip(1), ahead + rows - 1
        past = F.pad(past, (slots - past.shape[1], 0), value=-math.inf)  # distances past the window, or of no key
        if is_causal:
            later = past.new_full((past.shape[0], num_later), -math.inf)
        else:
            later = bias_table[:, 1 : num_later + 1]
            later = F.pad(later, (0, num_later - later.shape[1]))
        signed = torch.cat((past, later), dim=1)  # (H, n), at distance slots − 1 − index
        strip = signed.as_strided((signed.shape[0], rows, slots + ahead), (signed.shape[1], 1, 1))
        return cls(strip if is_reversed else strip.flip(1), rows, slots, ahead, is_reversed)

    def window(self, strip: torch.Tensor, rows: int, end: int, keys: slice) -> torch.Tensor:
        """(H, rows, keys) of a strip, for the block whose last row stands at slot `end` − 1."""
        first = self.slots - end
        held = slice(0, rows) if self.is_reversed else slice(self.rows - rows, self.rows)
        return strip[:, held, first + keys.start : first + keys.stop]

    def fold(self, gradient: torch.Tensor, length: int) -> torch.Tensor:
        """The gradient of a strip → (H, length), that of the table: each row is shifted and all are summed."""
        if not self.is_reversed:
            gradient = gradient.flip(1)
        num_heads, rows, width = gradient.shape
        lags = width + rows - 1
        skewed = F.pad(gradient, (0, rows)).flatten(1)[:, : rows * lags].view(num_heads, rows, lags)
        signed = skewed.sum(1)
        folded = signed[:, : self.slots].flip(1)
        folded = F.pad(folded, (0, max(length - self.slots, 0)))[:, :length].contiguous()
        if self.ahead:
            later = signed[:, self.slots :][:, : length - 1]
            folded[:, 1 : later.shape[1] + 1] += later
        return folded


def hidden_keys(call: TableCall, batch: slice, queries: torch.Tensor, keys: slice) -> torch.Tensor | None:
    """→ (b, 1, rows, keys) boolean, True where padding or another document hides a key; `None` if nothing does.

    Args:
        call: has the padding and the documents.
        batch: rows of the batch.
        queries: (rows,) slots of the queries.
        keys: slots of the keys.
    """
    hidden, documents = None, call.documents
    if call.key_mask is not None:
        hidden = ~call.key_mask[batch, None, None, keys]
    if documents is not None:
        documents = documents[batch if documents.shape[0] > 1 else slice(None)]
        other = (documents[:, queries, None] != documents[:, None, keys])[:, None]
        hidden = other if hidden is None else hidden | other
    return hidden


def block_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias_table: torch.Tensor,
    call: TableCall,
) -> tuple[torch.Tensor, torch.Tensor]:
    """→ (B, H, Q, D) in the dtype of `query` and the (B, H, Q) logarithm of the sum of exponentials of each row.

    Arguments as in `TableKernel.forward`.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    batch_size, num_heads, query_length, head_dim = query.shape
    # the kernel sums in fp32 whatever it multiplies
    taken_dtype = query.dtype if is_fast_on_cpu(query) else dtype
    offset, is_causal, window = call.offset, call.is_causal, call.window
    slots, num_groups = offset + query_length, key.shape[1]
    num_keys = slots if is_causal else key.shape[2]
    block = min(query_length, 64 if num_keys <= 128 else 128 if num_keys <= LONGEST_COPY else 256)
    is_reversed = num_keys > LONGEST_COPY
    bias = DistanceBias.build(bias_table.to(dtype), block, offset, slots, num_keys, is_causal, is_reversed, window)
    key, value = key.to(taken_dtype), value.to(taken_dtype)
    # laid out as the layers use it: the heads of a token beside each other
    out = query.new_empty(batch_size, query_length, num_heads, head_dim).transpose(1, 2)
    lse = query.new_empty(batch_size, num_heads, query_length, dtype=dtype)

    def attend(share: tuple[slice, slice]) -> None:
        batch, groups = share
        heads = _query_heads(groups, num_heads // num_groups)
        held_key, held_value, strip = key[batch, groups], value[batch, groups], bias.strip[heads]
        for start, rows, end, queries in iterate_blocks(query_length, block, offset, bias):
            keys = slice(first_key(end - rows, window), end if is_causal else num_keys)
            mask = bias.window(strip, rows, end, keys)[None]
            hidden = hidden_keys(call, batch, queries, keys)
            if hidden is not None:
                mask = torch.where(hidden, -math.inf, mask)
            taken = query[batch, heads, start : start + rows].to(taken_dtype)
            if bias.is_reversed:
                taken = taken.flip(2)
            shape = taken.shape
            # the heads that share a key are rows of one
            taken = taken.reshape(shape[0], held_key.shape[1], -1, head_dim)
            mask = mask.reshape(mask.shape[0], held_key.shape[1], -1, mask.shape[-1])
            block_out, block_lse = _attend(taken, held_key[:, :, keys], held_value[:, :, keys], mask, call.scaling)
            block_out, block_lse = block_out.reshape(shape), block_lse.reshape(shape[:3])
            if bias.is_reversed:
                block_out, block_lse = block_out.flip(2), block_lse.flip(2)
            out[batch, heads, start : start + rows] = block_out
            lse[batch, heads, start : start + rows] = block_lse

    run_in_threads(attend, _equal_shares(batch_size, num_groups, num_workers(query)), query.device)
    return out, lse


def first_key(slot: int, window: int | None) -> int:
    """The first key that a query at `slot` sees."""
    return 0 if window is None else max(slot - window + 1, 0)


def iterate_blocks(
    query_length: int, block: int, offset: int, bias: DistanceBias
) -> Iterator[tuple[int, int, int, torch.Tensor]]:
    """Blocks of rows, the last one first → first row, number of rows, slot after the last row, (rows,) slots."""
    for stop in range(query_length, 0, -block):
        start = max(stop - block, 0)
        slots = torch.arange(offset + start, offset + stop, device=bias.strip.device)
        yield start, stop - start, offset + stop, slots.flip(0) if bias.is_reversed else slots


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one block, (b, G, rows, D), and the logarithms of its sums; 0 and 0 where all keys are hidden."""
    if query.device.type == "cpu" and CPU_FLASH is not None:
        return CPU_FLASH(query, key, value, 0.0, False, attn_mask=mask, scale=scaling)
    scores = (query @ key.transpose(2, 3)).mul_(scaling).add_(mask)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -math.inf, 0.0)
    return scores.sub_(lse[..., None]).mul_(LOG2_E).exp2_() @ value, lse


def _equal_shares(batch_size: int, num_groups: int, workers: int) -> list[tuple[slice, slice]]:
    """Shares of equal size for the forward pass, of rows of the batch or else of key heads; one if neither suffices."""
    everything = slice(0, batch_size), slice(0, num_groups)
    for place, size in enumerate((batch_size, num_groups)):
        if size % workers == 0:
            step = size // workers
            parts = [slice(first, first + step) for first in range(0, size, step)]
            return [(part, everything[1]) if place == 0 else (everything[0], part) for part in parts]
    return [everything]


def _query_heads(groups: slice, group_size: int) -> slice:
    """The query heads of some key heads."""
    return slice(groups.start * group_size, groups.stop * group_size)


def block_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    bias_table: torch.Tensor,
    call: TableCall,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """→ the gradients of query, key, value and `bias_table`, each in its dtype. Arguments as in `block_forward`."""
    return _Backward(grad_out, query, key, value, out, lse, bias_table, call).run()


class BlockKernel(TableKernel):
    """The kernel of this file, for any device."""

    name = "blocks"
    is_fallback = True
    forward, backward = staticmethod(block_forward), staticmethod(block_backward)

    @staticmethod
    def supports(query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall) -> bool:
        return True


@dataclass
class _Chunk:
    """What a thread works on: b rows of the batch × g key heads, n = b · g; views of the whole where they can be."""

    batch: slice
    groups: slice
    query: torch.Tensor  # (b, g · R, Q, D)
    grad_out: torch.Tensor  # (b, g · R, Q, D)
    lse: torch.Tensor  # (b, g · R, Q, 1), in units of ln 2
    delta: torch.Tensor  # (b, g · R, Q, 1), grad_out · out
    key: torch.Tensor  # (n, K, D)
    value: torch.Tensor  # (n, K, D)
    grad_key: torch.Tensor
    grad_value: torch.Tensor


class _Backward:
    """One backward pass: chunks that fit a core's cache, each computed by one thread from start to end."""

    def __init__(self, grad_out, query, key, value, out, lse, bias_table, call: TableCall) -> None:
        self.grad_out, self.query, self.key, self.value, self.out, self.lse = grad_out, query, key, value, out, lse
        self.bias_table, self.call = bias_table, call
        self.is_causal, self.offset, self.window = call.is_causal, call.offset, call.window
        self.dtype = torch.promote_types(query.dtype, torch.float32)
        self.query_length, self.group_size = query.shape[2], query.shape[1] // key.shape[1]
        slots = self.offset + self.query_length
        self.num_keys = slots if self.is_causal else key.shape[2]
        self.block = min(self.query_length, 128)
        self.tile = min(self.num_keys, TILE_KEYS)
        self.bias = DistanceBias.build(
            bias_table.to(self.dtype) * LOG2_E,
            self.block,
            self.offset,
            slots,
            self.num_keys,
            self.is_causal,
            self.num_keys > LONGEST_COPY_BACKWARD,
            self.window,
        )
        # as the layers lay them out; no query sees the keys behind the last one
        self.grad_query, self.grad_key, self.grad_value = (
            x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2) for x in (query, key, value)
        )
        for gradient in (self.grad_key, self.grad_value):
            gradient[:, :, self.num_keys :] = 0

    def run(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        chunks = self._chunks()
        workers = min(num_workers(self.query), len(chunks))
        shares = [chunks[first::workers] for first in range(workers)]
        strips = run_in_threads(self._run_chunks, shares, self.query.device)
        strip = strips[0]
        for other in strips[1:]:  # in the order of the shares, whoever was done first
            strip += other
        grad_table = self.bias.fold(strip, self.bias_table.shape[1]).to(self.bias_table.dtype)
        return self.grad_query, self.grad_key, self.grad_value, grad_table

    def _chunks(self) -> list[tuple[slice, slice]]:
        """Rows of the batch and key heads, so many that the scores of a block stay below `CHUNK_SCORES`."""
        batch_size, num_groups = self.key.shape[:2]
        scores = self.group_size * self.block * self.tile
        groups = min(max(CHUNK_SCORES // scores, 1), num_groups)
        rows = 1 if groups < num_groups else min(max(CHUNK_SCORES // (scores * groups), 1), batch_size)
        return [
            (slice(row, min(row + rows, batch_size)), slice(group, min(group + groups, num_groups)))
            for row in range(0, batch_size, rows)
            for group in range(0, num_groups, groups)
        ]

    def _run_chunks(self, chunks: list[tuple[slice, slice]]) -> torch.Tensor:
        """Writes the gradients of some chunks; → the sum of those of their scores, in the form of the strip."""
        strip = torch.zeros_like(self.bias.strip, memory_format=torch.contiguous_format)
        largest = max((batch.stop - batch.start) * (groups.stop - groups.start) for batch, groups in chunks)
        buffers = strip.new_empty(2, largest * self.group_size * self.block * self.tile)
        for batch, groups in chunks:
            chunk = self._take(batch, groups)
            for start, rows, end, queries in iterate_blocks(self.query_length, self.block, self.offset, self.bias):
                self._run_block(chunk, start, rows, end, queries, strip, buffers)
            self._give(chunk)
        return strip

    def _take(self, batch: slice, groups: slice) -> _Chunk:
        heads = _query_heads(groups, self.group_size)
        query, grad_out, out, lse = (x[batch, heads] for x in (self.query, self.grad_out, self.out, self.lse))
        delta = (grad_out.to(self.dtype) * out).sum(-1, keepdim=True)
        key, value = (x[batch, groups, : self.num_keys].to(self.dtype).flatten(0, 1) for x in (self.key, self.value))
        gradients = (x[batch, groups, : self.num_keys] for x in (self.grad_key, self.grad_value))
        if batch.stop - batch.start == 1 and self.key.dtype == self.dtype:
            gradients = (x[0] for x in gradients)
        else:
            gradients = (torch.empty_like(x) for x in (key, value))
        if self.window is not None:  # no block of queries sees all keys
            gradients = tuple(x.zero_() for x in gradients)
        return _Chunk(batch, groups, query, grad_out, lse[..., None] * LOG2_E, delta, key, value, *gradients)

    def _run_block(
        self,
        chunk: _Chunk,
        start: int,
        rows: int,
        end: int,
        queries: torch.Tensor,
        strip: torch.Tensor,
        buffers: torch.Tensor,
    ) -> None:
        """Adds what a block of rows gives to the gradients of its chunk, for some keys at a time."""
        query, grad_out, lse, delta = (
            self._rows(x, start, rows) for x in (chunk.query, chunk.grad_out, chunk.lse, chunk.delta)
        )
        query = query * (self.call.scaling * LOG2_E)  # scores in units of ln 2
        # the last block comes first and, without a window, sees all keys: it finds their gradients empty
        kept = 0 if start + rows == self.query_length and self.window is None else 1
        heads = _query_heads(chunk.groups, self.group_size)
        num_keys, grad_query = end if self.is_causal else self.num_keys, torch.empty_like(query)
        begin = first_key(end - rows, self.window)
        for first in range(begin, num_keys, self.tile):
            keys = slice(first, min(first + self.tile, num_keys))
            key, value = chunk.key[:, keys], chunk.value[:, keys]
            grad_key, grad_value = chunk.grad_key[:, keys], chunk.grad_value[:, keys]
            shape = (len(query), query.shape[1], keys.stop - keys.start)
            by_head = (-1, heads.stop - heads.start, rows, shape[-1])
            weights, grad_scores = (buffer[: math.prod(shape)].view(shape) for buffer in buffers)

            scores = torch.bmm(query, key.transpose(1, 2), out=weights).view(by_head)
            scores += self.bias.window(self.bias.strip[heads], rows, end, keys)
            hidden = hidden_keys(self.call, chunk.batch, queries, keys)
            if hidden is not None:
                scores.masked_fill_(hidden, -math.inf)
            weights.sub_(lse).exp2_()
            torch.bmm(grad_out, value.transpose(1, 2), out=grad_scores)
            torch.baddbmm(grad_value, weights.transpose(1, 2), grad_out, beta=kept, out=grad_value)
            grad_scores.sub_(delta).mul_(weights)
            total = grad_scores.view(by_head)
            total = total[0] if len(total) == 1 else total.sum(0)
            self.bias.window(strip[heads], rows, end, keys).add_(total)
            torch.baddbmm(
                grad_query, grad_scores, key, beta=int(first > begin), alpha=self.call.scaling, out=grad_query
            )
            torch.baddbmm(grad_key, grad_scores.transpose(1, 2), query, beta=kept, alpha=LN_2, out=grad_key)
        grad_query = grad_query.view(chunk.batch.stop - chunk.batch.start, -1, rows, query.shape[-1])
        grad_query = grad_query.flip(2) if self.bias.is_reversed else grad_query
        self.grad_query[chunk.batch, heads, start : start + rows] = grad_query

    def _rows(self, x: torch.Tensor, start: int, rows: int) -> torch.Tensor:
        """(b, g · R, Q, d) → (n, R · rows, d), a block of the queries in the order of the bias."""
        x = x[:, :, start : start + rows].to(self.dtype)
        x = x.flip(2) if self.bias.is_reversed else x
        return x.reshape(-1, self.group_size * rows, x.shape[-1])

    def _give(self, chunk: _Chunk) -> None:
        """Copies the gradients of a chunk's keys and values to where they belong, if they are not there."""
        for whole, part in ((self.grad_key, chunk.grad_key), (self.grad_value, chunk.grad_value)):
            if part.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
                part = part.unflatten(0, (chunk.batch.stop - chunk.batch.start, -1))
                whole[chunk.batch, chunk.groups, : self.num_keys] = part
