"""Attention with a bias that depends on the distance alone, as Triton kernels, with memory linear in the length.

The kernels are tiled as FlashAttention-2 (Dao 2023, arXiv 2307.08691) is; each tile of scores reads the biases of its
diagonals from the (H, L) table. The gradient of the table is the sum of the scores' gradients along the diagonals.

Shape letters: B batch, H query heads, G key and value heads, Q query length, K key length, D head size, L length of the
table.
"""

from contextlib import nullcontext
from typing import Any

import torch

from .attention_kernel import TableCall, TableKernel


try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

LOG2_E = 1.4426950408889634
# programs that keep a large GPU busy; the kernel of the table's gradient is split until there are so many
NUM_PROGRAMS = 1024


if triton is not None:

    @triton.jit
    def _load(
        pointer, rows, num_rows, stride_row, stride_dim, D: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr
    ):
        """(rows, BLOCK_D), 0 outside of the tensor."""
        dims = tl.arange(0, BLOCK_D)
        inside = (rows < num_rows)[:, None] & (dims < D)[None, :]
        x = tl.load(pointer + rows[:, None] * stride_row + dims[None, :] * stride_dim, mask=inside, other=0.0)
        return x.to(tl.float32) if WIDEN else x

    @triton.jit
    def _store(pointer, x, rows, num_rows, stride_row, stride_dim, D: tl.constexpr, BLOCK_D: tl.constexpr):
        dims = tl.arange(0, BLOCK_D)
        inside = (rows < num_rows)[:, None] & (dims < D)[None, :]
        tl.store(
            pointer + rows[:, None] * stride_row + dims[None, :] * stride_dim,
            x.to(pointer.dtype.element_ty),
            mask=inside,
        )

    @triton.jit
    def _scores(
        query, key, rows, columns, table, key_mask, documents, offset, Q, K, scale,
        IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    ):  # fmt: skip
        """(rows, columns) scores of a tile in units of ln 2, −inf where a key is hidden."""
        distance = offset + rows[:, None] - columns[None, :]
        visible = (rows < Q)[:, None] & (columns < K)[None, :]
        if IS_CAUSAL:
            visible = visible & (distance >= 0)
        else:
            distance = tl.abs(distance)
        if WINDOW > 0:
            visible = visible & (distance < WINDOW)
        if HAS_MASK:
            visible = visible & (tl.load(key_mask + columns, mask=columns < K, other=0) != 0)[None, :]
        if HAS_DOCUMENTS:
            own = tl.load(documents + offset + rows, mask=rows < Q, other=-1)
            theirs = tl.load(documents + columns, mask=columns < K, other=-2)
            visible = visible & (own[:, None] == theirs[None, :])
        bias = tl.load(table + distance, mask=visible, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale + bias * 1.4426950408889634
        return tl.where(visible, scores, float("-inf"))

    @triton.jit
    def _forward_kernel(
        query_ptr, key_ptr, value_ptr, table_ptr, mask_ptr, documents_ptr, out_ptr, lse_ptr,
        q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, c_b,
        H, R, Q, K, L, offset, scale,
        IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
        WIDEN: tl.constexpr,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        # the last rows see the most keys: they start first
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
        rows = first + tl.arange(0, BLOCK_Q)
        query = _load(query_ptr + batch * q_b + head * q_h, rows, Q, q_n, q_d, D, BLOCK_D, WIDEN)
        largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        stop = K
        if IS_CAUSAL:
            stop = tl.minimum(K, offset + first + BLOCK_Q)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(offset + first - WINDOW + 1, 0) // BLOCK_K * BLOCK_K
        for start in range(begin, stop, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            key = _load(key_ptr + batch * k_b + (head // R) * k_h, columns, K, k_n, k_d, D, BLOCK_D, WIDEN)
            value = _load(value_ptr + batch * v_b + (head // R) * v_h, columns, K, v_n, v_d, D, BLOCK_D, WIDEN)
            scores = _scores(
                query, key, rows, columns, table_ptr + head * L, mask_ptr + batch * m_b, documents_ptr + batch * c_b,
                offset, Q, K, scale, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW,
            )  # fmt: skip
            new = tl.maximum(largest, tl.max(scores, 1))
            shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
            weights = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(largest - shift)
            total = total * decay + tl.sum(weights, 1)
            out = out * decay[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
            largest = new
        seen = total > 0
        total = tl.where(seen, total, 1.0)
        lse = tl.where(seen, largest + tl.log2(total), 0.0) / 1.4426950408889634
        _store(out_ptr + batch * o_b + head * o_h, out / total[:, None], rows, Q, o_n, o_d, D, BLOCK_D)
        tl.store(lse_ptr + (batch * H + head) * Q + rows, lse, mask=rows < Q)

    @triton.jit
    def _tile_gradient(
        query, key, value, grad_out, lse, delta, rows, columns, table, key_mask, documents, offset, Q, K, scale,
        IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    ):  # fmt: skip
        """The weights of a tile and the gradients of its scores."""
        scores = _scores(
            query, key, rows, columns, table, key_mask, documents, offset, Q, K, scale,
            IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW,
        )  # fmt: skip
        weights = tl.exp2(scores - lse[:, None] * 1.4426950408889634)
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        return weights, weights * (grad_weights - delta[:, None])

    @triton.jit
    def _key_value_kernel(
        query_ptr, key_ptr, value_ptr, table_ptr, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
        grad_key_ptr, grad_value_ptr,
        q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, c_b,
        dk_b, dk_h, dk_n, dk_d, dv_b, dv_h, dv_n, dv_d,
        H, R, Q, K, L, offset, scale, scaling,
        IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
        WIDEN: tl.constexpr,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        group, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        first = tl.program_id(0) * BLOCK_K
        columns = first + tl.arange(0, BLOCK_K)
        key = _load(key_ptr + batch * k_b + group * k_h, columns, K, k_n, k_d, D, BLOCK_D, WIDEN)
        value = _load(value_ptr + batch * v_b + group * v_h, columns, K, v_n, v_d, D, BLOCK_D, WIDEN)
        grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        begin = 0
        if IS_CAUSAL:
            begin = tl.maximum(first - offset, 0) // BLOCK_Q * BLOCK_Q
        stop = Q
        if WINDOW > 0:
            stop = tl.minimum(Q, first + BLOCK_K - 1 + WINDOW - offset)
        for head in range(group * R, group * R + R):
            for start in range(begin, stop, BLOCK_Q):
                rows = start + tl.arange(0, BLOCK_Q)
                query = _load(query_ptr + batch * q_b + head * q_h, rows, Q, q_n, q_d, D, BLOCK_D, WIDEN)
                grad_out = _load(grad_out_ptr + batch * o_b + head * o_h, rows, Q, o_n, o_d, D, BLOCK_D, WIDEN)
                lse = tl.load(lse_ptr + (batch * H + head) * Q + rows, mask=rows < Q, other=0.0)
                delta = tl.load(delta_ptr + (batch * H + head) * Q + rows, mask=rows < Q, other=0.0)
                weights, grad_scores = _tile_gradient(
                    query, key, value, grad_out, lse, delta, rows, columns, table_ptr + head * L,
                    mask_ptr + batch * m_b, documents_ptr + batch * c_b, offset, Q, K, scale,
                    IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW,
                )  # fmt: skip
                grad_value += tl.dot(tl.trans(weights.to(grad_out.dtype)), grad_out, input_precision="ieee")
                grad_key += tl.dot(tl.trans(grad_scores.to(query.dtype)), query, input_precision="ieee")
        _store(grad_key_ptr + batch * dk_b + group * dk_h, grad_key * scaling, columns, K, dk_n, dk_d, D, BLOCK_D)
        _store(grad_value_ptr + batch * dv_b + group * dv_h, grad_value, columns, K, dv_n, dv_d, D, BLOCK_D)

    @triton.jit
    def _add_diagonals(
        grad_scores, grad_table, distance, L, IS_CAUSAL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr
    ):
        """Adds the sums along the diagonals of a tile whose corner has `distance` to the table's gradient.

        Column (r + m) mod BLOCK_K of row r comes to column m: what stood on one diagonal then stands in one column, and
        each time that r + m wraps around begins another diagonal.
        """
        rows, lags = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
        turned = rows[:, None] + lags[None, :]
        skewed = tl.gather(grad_scores, turned % BLOCK_K, 1)
        for wrap in tl.static_range((BLOCK_Q + BLOCK_K - 2) // BLOCK_K + 1):
            sums = tl.sum(tl.where(turned // BLOCK_K == wrap, skewed, 0.0), 0)
            d = distance - lags + BLOCK_K * wrap
            if not IS_CAUSAL:
                d = tl.abs(d)
            tl.atomic_add(grad_table + d, sums, mask=(d >= 0) & (d < L))

    @triton.jit
    def _query_kernel(
        query_ptr, key_ptr, value_ptr, table_ptr, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
        grad_query_ptr, grad_table_ptr,
        q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, c_b,
        dq_b, dq_h, dq_n, dq_d,
        H, R, Q, K, L, offset, scale, scaling,
        ADD_TABLE: tl.constexpr,
        IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
        WIDEN: tl.constexpr,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
        first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_Q
        rows = first + tl.arange(0, BLOCK_Q)
        query = _load(query_ptr + batch * q_b + head * q_h, rows, Q, q_n, q_d, D, BLOCK_D, WIDEN)
        grad_out = _load(grad_out_ptr + batch * o_b + head * o_h, rows, Q, o_n, o_d, D, BLOCK_D, WIDEN)
        lse = tl.load(lse_ptr + (batch * H + head) * Q + rows, mask=rows < Q, other=0.0)
        delta = tl.load(delta_ptr + (batch * H + head) * Q + rows, mask=rows < Q, other=0.0)
        grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
        stop = K
        if IS_CAUSAL:
            stop = tl.minimum(K, offset + first + BLOCK_Q)
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(offset + first - WINDOW + 1, 0) // BLOCK_K * BLOCK_K
        for start in range(begin, stop, BLOCK_K):
            columns = start + tl.arange(0, BLOCK_K)
            key = _load(key_ptr + batch * k_b + (head // R) * k_h, columns, K, k_n, k_d, D, BLOCK_D, WIDEN)
            value = _load(value_ptr + batch * v_b + (head // R) * v_h, columns, K, v_n, v_d, D, BLOCK_D, WIDEN)
            _, grad_scores = _tile_gradient(
                query, key, value, grad_out, lse, delta, rows, columns, table_ptr + head * L,
                mask_ptr + batch * m_b, documents_ptr + batch * c_b, offset, Q, K, scale,
                IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW,
            )  # fmt: skip
            grad_query += tl.dot(grad_scores.to(key.dtype), key, input_precision="ieee")
            if ADD_TABLE:
                _add_diagonals(
                    grad_scores, grad_table_ptr + head * L, offset + first - start, L, IS_CAUSAL, BLOCK_Q, BLOCK_K
                )
        _store(grad_query_ptr + batch * dq_b + head * dq_h, grad_query * scaling, rows, Q, dq_n, dq_d, D, BLOCK_D)

    @triton.jit
    def _table_kernel(
        query_ptr, key_ptr, value_ptr, table_ptr, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr, sums_ptr,
        q_b, q_h, q_n, q_d, k_b, k_h, k_n, k_d, v_b, v_h, v_n, v_d, o_b, o_h, o_n, o_d, m_b, c_b,
        B, H, R, Q, K, L, offset, scale, lowest,
        IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
        WIDEN: tl.constexpr,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """The sum of all tiles on one diagonal of tiles, row block − key block = lowest + program 0, of one head.

        Programs of axis 2 share the tiles of all batch rows out among them; each adds its own in a fixed order.
        """
        diagonal, head, share = tl.program_id(0) + lowest, tl.program_id(1), tl.program_id(2)
        begin = tl.maximum(diagonal, 0)
        num_tiles = tl.maximum(tl.minimum(tl.cdiv(Q, BLOCK), tl.cdiv(K, BLOCK) + diagonal) - begin, 0)
        sums = tl.zeros([BLOCK, BLOCK], tl.float32)
        for tile in range(share, B * num_tiles, tl.num_programs(2)):
            batch = (tile // num_tiles).to(tl.int64)
            block = begin + tile % num_tiles
            rows = block * BLOCK + tl.arange(0, BLOCK)
            columns = (block - diagonal) * BLOCK + tl.arange(0, BLOCK)
            query = _load(query_ptr + batch * q_b + head * q_h, rows, Q, q_n, q_d, D, BLOCK_D, WIDEN)
            grad_out = _load(grad_out_ptr + batch * o_b + head * o_h, rows, Q, o_n, o_d, D, BLOCK_D, WIDEN)
            key = _load(key_ptr + batch * k_b + (head // R) * k_h, columns, K, k_n, k_d, D, BLOCK_D, WIDEN)
            value = _load(value_ptr + batch * v_b + (head // R) * v_h, columns, K, v_n, v_d, D, BLOCK_D, WIDEN)
            lse = tl.load(lse_ptr + (batch * H + head) * Q + rows, mask=rows < Q, other=0.0)
            delta = tl.load(delta_ptr + (batch * H + head) * Q + rows, mask=rows < Q, other=0.0)
            _, grad_scores = _tile_gradient(
                query, key, value, grad_out, lse, delta, rows, columns, table_ptr + head * L,
                mask_ptr + batch * m_b, documents_ptr + batch * c_b, offset, Q, K, scale,
                IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW,
            )  # fmt: skip
            sums += grad_scores
        program = (tl.program_id(0) * H + head) * tl.num_programs(2) + share
        at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
        tl.store(sums_ptr + program.to(tl.int64) * BLOCK * BLOCK + at, sums)


class _Launch:
    """What all kernels of one attention share: sizes, strides, masks and the sizes of tiles."""

    def __init__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias_table: torch.Tensor,
        like_out: torch.Tensor,
        call: TableCall,
    ) -> None:
        key_mask, documents = call.key_mask, call.documents
        self.batch_size, self.num_heads, self.query_length, head_dim = query.shape
        self.num_groups, self.num_keys = key.shape[1:3]
        self.is_causal, self.offset = call.is_causal, call.offset
        self.length = bias_table.shape[1]
        empty = bias_table  # a pointer that is not read
        key_mask_rows = empty if key_mask is None else key_mask.to(torch.int8).contiguous()
        document_rows = empty if documents is None else documents.to(torch.int32).contiguous()
        self.tensors = (query, key, value, bias_table.contiguous(), key_mask_rows, document_rows)
        mask_stride = 0 if key_mask is None else key_mask_rows.stride(0)
        document_stride = 0 if documents is None or documents.shape[0] == 1 else document_rows.stride(0)
        self.strides = (
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *like_out.stride(),
            mask_stride,
            document_stride,
        )
        sizes = (self.num_heads // self.num_groups, self.query_length, self.num_keys, self.length, call.offset)
        self.sizes = (self.num_heads, *sizes, call.scaling * LOG2_E)
        self.flags = {
            "IS_CAUSAL": call.is_causal,
            "HAS_MASK": key_mask is not None,
            "HAS_DOCUMENTS": documents is not None,
            "WINDOW": call.window or 0,
            # the interpreter, which runs on CPUs, multiplies no bf16
            "WIDEN": query.device.type == "cpu",
            "D": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        }
        self.row_bytes = self.flags["BLOCK_D"] * query.element_size()

    def tiles(self, is_backward: bool) -> dict[str, Any]:
        """Rows and keys of a tile and warps of a program, by the bytes of a head: what registers hold when compiled."""
        if self.row_bytes <= 128:
            rows, keys, warps = (64, 32, 4) if is_backward else (128, 64, 8)
        elif self.row_bytes <= 256:
            rows, keys, warps = (32, 32, 8) if is_backward else (32, 32, 4)
        else:
            rows, keys, warps = 16, 32, 8
        return {"BLOCK_Q": rows, "BLOCK_K": keys, "num_warps": warps}


def _on(device: torch.device) -> Any:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
    out = _like_layers(query)
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    launch = _Launch(query, key, value, bias_table, out, call)
    tiles = launch.tiles(is_backward=False)
    grid = (triton.cdiv(launch.query_length, tiles["BLOCK_Q"]), launch.num_heads, launch.batch_size)
    with _on(query.device):
        _forward_kernel[grid](*launch.tensors, out, lse, *launch.strides, *launch.sizes, **launch.flags, **tiles)
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
        is_deterministic: whether the table's gradient is summed in a fixed order, by a kernel of its own, in place of
            atomic additions.
    """
    launch = _Launch(query, key, value, bias_table, grad_out, call)
    delta = torch.linalg.vecdot(grad_out.float(), out.float())
    tensors = (*launch.tensors, grad_out, lse, delta.contiguous())
    grad_query, grad_key, grad_value = _like_layers(query), _like_layers(key), _like_layers(value)
    grad_table = torch.zeros(bias_table.shape, device=query.device)
    tiles = launch.tiles(is_backward=True)
    options = {**launch.flags, **tiles}
    with _on(query.device):
        grid = (triton.cdiv(launch.num_keys, tiles["BLOCK_K"]), launch.num_groups, launch.batch_size)
        strides = (*launch.strides, *grad_key.stride(), *grad_value.stride())
        _key_value_kernel[grid](*tensors, grad_key, grad_value, *strides, *launch.sizes, call.scaling, **options)
        grid = (triton.cdiv(launch.query_length, tiles["BLOCK_Q"]), launch.num_heads, launch.batch_size)
        strides = (*launch.strides, *grad_query.stride())
        _query_kernel[grid](
            *tensors,
            grad_query,
            grad_table,
            *strides,
            *launch.sizes,
            call.scaling,
            ADD_TABLE=not is_deterministic,
            **options,
        )
        if is_deterministic:
            grad_table = _table_gradient(launch, tensors)
    return grad_query, grad_key, grad_value, grad_table


class TritonKernel(TableKernel):
    """The kernels of this file, on a GPU where Triton is installed."""

    name = "triton"
    forward, backward = staticmethod(triton_forward), staticmethod(triton_backward)

    @staticmethod
    def supports(query: torch.Tensor, key: torch.Tensor, bias_table: torch.Tensor, call: TableCall) -> bool:
        return query.is_cuda and triton is not None and query.dtype != torch.float64


def _table_gradient(launch: _Launch, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """→ (H, L): the tiles of each diagonal of tiles are summed by a kernel, the diagonals of the sums here."""
    block = 64 if launch.row_bytes <= 128 else 32
    num_rows, num_columns = triton.cdiv(launch.query_length, block), triton.cdiv(launch.num_keys, block)
    lowest = 1 - num_columns
    if launch.is_causal:  # diagonals with a distance of 0 or more
        lowest = max(lowest, -((launch.offset + block - 1) // block))
    highest = num_rows - 1
    if launch.flags["WINDOW"]:  # a tile's least distance is offset + block · diagonal − (block − 1)
        highest = min(highest, (launch.flags["WINDOW"] - launch.offset + 2 * block - 2) // block - 1)
    num_diagonals = highest + 1 - lowest
    shares = triton.cdiv(NUM_PROGRAMS, num_diagonals * launch.num_heads)
    shares = min(shares, launch.batch_size * min(num_rows, num_columns))
    sums = tensors[-1].new_empty(num_diagonals, launch.num_heads, shares, block, block)
    _table_kernel[(num_diagonals, launch.num_heads, shares)](
        *tensors,
        sums,
        *launch.strides,
        launch.batch_size,
        *launch.sizes,
        lowest,
        **launch.flags,
        BLOCK=block,
        num_warps=8,
    )
    # row r of a tile, from its last column to its first, stands at distances that grow by one
    sums = torch.nn.functional.pad(sums.sum(2).transpose(0, 1).flip(-1), (0, block))
    skewed = sums.flatten(2)[..., : block * (2 * block - 1)].unflatten(-1, (block, 2 * block - 1)).sum(-2)
    # (H, diagonals, 2 · block − 1), from distance offset + block · diagonal − (block − 1) on; neighbours overlap
    early, late = skewed[..., : block - 1], skewed[..., block - 1 :]
    signed = torch.nn.functional.pad(late.flatten(1), (block, 0))
    signed[:, : num_diagonals * block].unflatten(1, (num_diagonals, block))[..., 1:] += early
    return _fold(signed, launch.offset + (lowest - 1) * block, launch.length)


def _fold(signed: torch.Tensor, first: int, length: int) -> torch.Tensor:
    """(H, n) gradients at the distances from `first` on → (H, length), those of negative distances added to theirs."""
    folded = signed.new_zeros(signed.shape[0], length)
    ahead = signed[:, max(-first, 0) :][:, : length - max(first, 0)]
    folded[:, max(first, 0) :][:, : ahead.shape[1]] = ahead
    if first < 0:
        behind = signed[:, :-first].flip(1)[:, : length - 1]  # distances −1, −2, ..
        folded[:, 1 : behind.shape[1] + 1] += behind
    return folded
