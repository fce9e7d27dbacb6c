"""What the Triton kernels share: where a program works, tiles of rows, their scores, and the forward kernel.

A program walks over tiles of scores. Tiles that every query of the tile sees whole are computed without masks or
bounds; those at the diagonal, at the edge of a window or at the end of a row with them, and all of them where there is
padding or more than one document. The bias of a tile is read from a strip, the table in units of ln 2 over all signed
distances, with room on both sides, so that no tile reads outside of it.

Sizes are as in `attention_triton`: B batch, H query heads, R query heads of a key head, Q query length, K key length,
D head size, S length of a strip; x_b, x_h and x_n are the strides of a tensor x.
"""

from __future__ import annotations

from collections.abc import Callable


try:
    import triton
    import triton.language as tl

    jit = triton.jit
except ImportError:
    triton = tl = None

    def jit(function: Callable | None = None, **options: object) -> Callable:
        """Leaves functions as they are that nothing can compile here."""
        return function if function is not None else jit


# their values decide nothing about the code: without this each of them that is 1 or a multiple of 16 would be compiled
SIZES = ["H", "R", "Q", "K", "S", "offset", "origin", "m_b", "c_b"]


@jit
def locate(num_blocks, H):
    """→ block, head and batch row of this program. All are on axis 0 of the grid, the others end at 65,535."""
    program = tl.program_id(0)
    rest = program // num_blocks
    return program % num_blocks, (rest % H).to(tl.int64), (rest // H).to(tl.int64)


@jit
def load_rows(
    pointer, first, num_rows, stride, CHECK: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_D) rows from `first` on; with CHECK, those after the last one are 0; without, there are none."""
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    if CHECK:
        x = tl.load(at, mask=(rows < num_rows - first)[:, None] & (dims < D)[None, :], other=0.0)
    elif D < BLOCK_D:
        x = tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x.to(tl.float32) if WIDEN else x


@jit
def store_rows(pointer, x, first, num_rows, stride, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr):
    rows, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    at = pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])
    tl.store(at, x.to(pointer.dtype.element_ty), mask=(rows < num_rows - first)[:, None] & (dims < D)[None, :])


@jit
def exp2(x, PTX: tl.constexpr):
    """2^x, 0 where that is no normal number: what `tl.exp2` adds for those is three instructions of four."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@jit
def read_strip(at, PTX: tl.constexpr):
    """fp32 numbers, from the cache to the registers that hold the scores: `tl.load` would take them through shared
    memory, one by one, and more of it than for keys and values."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ld.global.nc.f32 $0, [$1];", "=f,l", [at], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.load(at)


@jit
def split_tiles(begin, stop, whole_begin, whole_end, BLOCK: tl.constexpr):
    """Tiles from `begin` to `stop`, of which those from `whole_begin` to `whole_end`, if any, are whole.

    → the first whole tile, the end of the whole tiles, the number of other tiles before and after them. All but `stop`
    are multiples of BLOCK.
    """
    whole_begin = tl.minimum(whole_begin, tl.cdiv(stop, BLOCK) * BLOCK)
    whole_end = tl.maximum(tl.minimum(whole_end, stop // BLOCK * BLOCK), whole_begin)
    before = tl.maximum(whole_begin - begin, 0) // BLOCK
    after = tl.maximum(tl.cdiv(stop - whole_end, BLOCK), 0)
    return whole_begin, whole_end, before, after


@jit
def split_keys(
    first, offset, Q, K, IS_CAUSAL: tl.constexpr, IS_MASKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles of keys that a block of queries sees, as `split_tiles`, after the first of them."""
    slot = offset + first
    begin, stop, whole_begin, whole_end = slot * 0, slot * 0 + K, slot * 0, slot * 0 + K // BLOCK_K * BLOCK_K
    if IS_CAUSAL:
        stop = tl.minimum(tl.minimum(slot + BLOCK_Q, offset + Q), K)
        whole_end = tl.minimum(slot + 1, K) // BLOCK_K * BLOCK_K
    if WINDOW > 0:
        begin = tl.maximum(slot - WINDOW + 1, 0) // BLOCK_K * BLOCK_K
        whole_begin = tl.cdiv(tl.maximum(slot + BLOCK_Q - WINDOW, 0), BLOCK_K) * BLOCK_K
    if IS_MASKED:
        whole_begin, whole_end = begin, begin
    whole_begin, whole_end, before, after = split_tiles(begin, stop, whole_begin, whole_end, BLOCK_K)
    return begin, whole_begin, whole_end, before, after


@jit
def tile_scores(
    left, right, strip_at, query_slots, key_slots, key_mask, documents, K, num_slots, scale,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """Scores of a tile in units of ln 2, −inf where a key is hidden, with a row for each of `left`, queries or keys.

    `query_slots` and `key_slots` are (n, 1) or (1, n), as the tile lies; `num_slots` is the slot after the last query.
    """
    scores = tl.dot(left, tl.trans(right), input_precision=PRECISION) * scale + read_strip(strip_at, PTX)
    if not WHOLE:
        visible = key_slots < K
        if IS_CAUSAL:
            visible = visible & (query_slots >= key_slots)
        if WINDOW > 0:
            visible = visible & (query_slots - key_slots < WINDOW)
        if HAS_MASK:
            visible = visible & (tl.load(key_mask + key_slots, mask=key_slots < K, other=0) != 0)
        if HAS_DOCUMENTS:
            own = tl.load(documents + query_slots, mask=query_slots < num_slots, other=0)
            visible = visible & (own == tl.load(documents + key_slots, mask=key_slots < K, other=0))
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@jit
def score_keys(
    query, key_ptr, value_ptr, strip_at, query_slots, key_mask, documents, start, k_n, v_n, K, num_slots, scale,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """→ keys and values from `start` on, and the scores of their tile, with queries as rows."""
    key = load_rows(key_ptr, start, K, k_n, not WHOLE, WIDEN, D, BLOCK_D, BLOCK_K)
    value = load_rows(value_ptr, start, K, v_n, not WHOLE, WIDEN, D, BLOCK_D, BLOCK_K)
    key_slots = (start + tl.arange(0, BLOCK_K))[None, :]
    scores = tile_scores(
        query, key, strip_at, query_slots, key_slots, key_mask, documents, K, num_slots, scale,
        WHOLE, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX,
    )  # fmt: skip
    return key, value, scores


@jit
def _forward_tile(
    query, key_ptr, value_ptr, strip_at, query_slots, key_mask, documents, start, k_n, v_n, K, num_slots, scale,
    largest, total, out,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """→ largest scores, sums of weights and outputs after the keys from `start` on."""
    _, value, scores = score_keys(
        query, key_ptr, value_ptr, strip_at - start, query_slots, key_mask, documents, start, k_n, v_n, K, num_slots,
        scale, WHOLE, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    new = tl.maximum(largest, tl.max(scores, 1))
    shift = new
    if not WHOLE:
        shift = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen no key yet
    weights = exp2(scores - shift[:, None], PTX)
    decay = exp2(largest - shift, PTX)
    total = total * decay + tl.sum(weights, 1)
    out = tl.dot(weights.to(value.dtype), value, out * decay[:, None], input_precision=PRECISION)
    return new, total, out


@jit(do_not_specialize=SIZES)
def forward_kernel(
    query_ptr, key_ptr, value_ptr, strip_ptr, mask_ptr, documents_ptr, out_ptr, lse_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, m_b, c_b,
    H, R, Q, K, S, offset, origin, scale,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Outputs and logarithms of the sums of exponentials of a block of queries."""
    num_blocks = tl.cdiv(Q, BLOCK_Q)
    block, head, batch = locate(num_blocks, H)
    first = (num_blocks - 1 - block) * BLOCK_Q  # the last rows see the most keys: they start first
    query = load_rows(query_ptr + batch * q_b + head * q_h, first, Q, q_n, True, WIDEN, D, BLOCK_D, BLOCK_Q)
    key_ptr += batch * k_b + head // R * k_h
    value_ptr += batch * v_b + head // R * v_h
    key_mask, documents = mask_ptr + batch * m_b, documents_ptr + batch * c_b
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    query_slots = (offset + first + rows)[:, None]
    strip_at = strip_ptr + head * S + origin + first + (rows.to(tl.int64)[:, None] - columns.to(tl.int64)[None, :])
    largest = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    out = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    begin, whole_begin, whole_end, before, after = split_keys(
        first, offset, Q, K, IS_CAUSAL, HAS_MASK or HAS_DOCUMENTS, WINDOW, BLOCK_Q, BLOCK_K
    )
    if not (HAS_MASK or HAS_DOCUMENTS):
        for start in range(whole_begin, whole_end, BLOCK_K):
            largest, total, out = _forward_tile(
                query, key_ptr, value_ptr, strip_at, query_slots, key_mask, documents, start, k_n, v_n, K, offset + Q,
                scale, largest, total, out,
                True, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_K,
            )  # fmt: skip
    for index in range(0, before + after):
        start = tl.where(index < before, begin + index * BLOCK_K, whole_end + (index - before) * BLOCK_K)
        largest, total, out = _forward_tile(
            query, key_ptr, value_ptr, strip_at, query_slots, key_mask, documents, start, k_n, v_n, K, offset + Q,
            scale, largest, total, out,
            False, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_K,
        )  # fmt: skip
    seen = total > 0
    total = tl.where(seen, total, 1.0)
    lse = tl.where(seen, largest + tl.log2(total), 0.0) * 0.6931471805599453
    store_rows(out_ptr + batch * o_b + head * o_h, out / total[:, None], first, Q, o_n, D, BLOCK_D, BLOCK_Q)
    tl.store(lse_ptr + (batch * H + head) * Q + first + rows, lse, mask=first + rows < Q)
