"""The kernels of the backward pass: delta, the gradients of keys and values, of queries, and of the table.

Each computes the weights of its tiles again. Sizes and names as in `attention_triton_tiles`.
"""

from __future__ import annotations

from .attention_triton_tiles import (
    SIZES,
    exp2,
    jit,
    load_rows,
    locate,
    score_keys,
    split_keys,
    split_tiles,
    store_rows,
    tile_scores,
    tl,
)


@jit(do_not_specialize=SIZES)
def delta_kernel(
    out_ptr, grad_out_ptr, lse_ptr, lse_2_ptr, delta_ptr, o_b, o_h, o_n, do_b, do_h, do_n, H, Q,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Of each row, the logarithm of its sum in units of ln 2, and delta, its output times the gradient of that."""
    block, head, batch = locate(tl.cdiv(Q, BLOCK_Q), H)
    first = block * BLOCK_Q
    out = load_rows(out_ptr + batch * o_b + head * o_h, first, Q, o_n, True, True, D, BLOCK_D, BLOCK_Q)
    grad_out = load_rows(grad_out_ptr + batch * do_b + head * do_h, first, Q, do_n, True, True, D, BLOCK_D, BLOCK_Q)
    rows = first + tl.arange(0, BLOCK_Q)
    at = (batch * H + head) * Q + rows
    tl.store(lse_2_ptr + at, tl.load(lse_ptr + at, mask=rows < Q) * 1.4426950408889634, mask=rows < Q)
    tl.store(delta_ptr + at, tl.sum(out * grad_out, 1), mask=rows < Q)


@jit
def _row_numbers(lse_ptr, delta_ptr, first, Q, CHECK: tl.constexpr, BLOCK_Q: tl.constexpr):
    """→ (BLOCK_Q,) logarithms of sums, +inf after the last row so that its weights are 0, and delta."""
    rows = first + tl.arange(0, BLOCK_Q)
    if CHECK:
        lse = tl.load(lse_ptr + rows, mask=rows < Q, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=rows < Q, other=0.0)
    else:
        lse, delta = tl.load(lse_ptr + rows), tl.load(delta_ptr + rows)
    return lse, delta


@jit
def _key_value_tile(
    key, value, query_ptr, grad_out_ptr, lse_ptr, delta_ptr, strip_at, key_slots, key_mask, documents, start, head,
    q_h, q_n, do_h, do_n, Q, K, S, offset, scale, grad_key, grad_value,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """→ the gradients after the queries of a head from `start` on. The tile has keys as rows: as it is multiplied."""
    query = load_rows(query_ptr + head * q_h, start, Q, q_n, not WHOLE, WIDEN, D, BLOCK_D, BLOCK_Q)
    grad_out = load_rows(grad_out_ptr + head * do_h, start, Q, do_n, not WHOLE, WIDEN, D, BLOCK_D, BLOCK_Q)
    lse, delta = _row_numbers(lse_ptr + head * Q, delta_ptr + head * Q, start, Q, not WHOLE, BLOCK_Q)
    query_slots = (offset + start + tl.arange(0, BLOCK_Q))[None, :]
    scores = tile_scores(
        key, query, strip_at + (head * S + start), query_slots, key_slots, key_mask, documents, K, offset + Q, scale,
        WHOLE, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX,
    )  # fmt: skip
    weights = exp2(scores - lse[None, :], PTX)
    grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision=PRECISION)
    grad_scores = weights * (tl.dot(value, tl.trans(grad_out), input_precision=PRECISION) - delta[None, :])
    grad_key = tl.dot(grad_scores.to(query.dtype), query, grad_key, input_precision=PRECISION)
    return grad_key, grad_value


@jit
def _split_queries(
    first, offset, Q, IS_CAUSAL: tl.constexpr, IS_MASKED: tl.constexpr, WINDOW: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tiles of queries that see a block of keys, as `split_tiles`, after the first of them."""
    begin, stop, whole_begin, whole_end = first * 0, first * 0 + Q, first * 0, first * 0 + Q // BLOCK_Q * BLOCK_Q
    if IS_CAUSAL:
        begin = tl.maximum(first - offset, 0) // BLOCK_Q * BLOCK_Q
        whole_begin = tl.cdiv(tl.maximum(first + BLOCK_K - 1 - offset, 0), BLOCK_Q) * BLOCK_Q
    if WINDOW > 0:
        stop = tl.minimum(stop, tl.maximum(first + BLOCK_K - 1 + WINDOW - offset, 0))
        whole_end = tl.minimum(whole_end, tl.maximum(first + WINDOW - offset, 0) // BLOCK_Q * BLOCK_Q)
    if IS_MASKED:
        whole_begin, whole_end = begin, begin
    whole_begin, whole_end, before, after = split_tiles(begin, stop, whole_begin, whole_end, BLOCK_Q)
    return begin, whole_begin, whole_end, before, after


@jit(do_not_specialize=SIZES)
def key_value_kernel(
    query_ptr, key_ptr, value_ptr, strip_ptr, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    grad_key_ptr, grad_value_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, m_b, c_b, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    H, R, Q, K, S, offset, origin, scale, scaling,
    IS_GROUPED: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of keys and values of one key head, from all its query heads."""
    block, group, batch = locate(tl.cdiv(K, BLOCK_K), H // R)
    first = block * BLOCK_K
    key = load_rows(key_ptr + batch * k_b + group * k_h, first, K, k_n, True, WIDEN, D, BLOCK_D, BLOCK_K)
    value = load_rows(value_ptr + batch * v_b + group * v_h, first, K, v_n, True, WIDEN, D, BLOCK_D, BLOCK_K)
    key_mask, documents = mask_ptr + batch * m_b, documents_ptr + batch * c_b
    columns, rows = tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_Q)
    key_slots = (first + columns)[:, None]
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    begin, whole_begin, whole_end, before, after = _split_queries(
        first, offset, Q, IS_CAUSAL, HAS_MASK or HAS_DOCUMENTS, WINDOW, BLOCK_Q, BLOCK_K
    )
    query_ptr += batch * q_b
    grad_out_ptr += batch * do_b
    lse_ptr += batch * H * Q
    delta_ptr += batch * H * Q
    strip_at = strip_ptr + origin - first + (rows.to(tl.int64)[None, :] - columns.to(tl.int64)[:, None])
    # one loop over the tiles of all heads, not one in another: it keeps what it adds to in registers
    if not (HAS_MASK or HAS_DOCUMENTS):
        head, start = group * R, whole_begin
        for _ in range(0, (whole_end - whole_begin) // BLOCK_Q * R):
            grad_key, grad_value = _key_value_tile(
                key, value, query_ptr, grad_out_ptr, lse_ptr, delta_ptr, strip_at, key_slots, key_mask, documents,
                start, head, q_h, q_n, do_h, do_n, Q, K, S, offset, scale, grad_key, grad_value,
                True, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_Q,
            )  # fmt: skip
            start += BLOCK_Q
            if IS_GROUPED:
                head = tl.where(start < whole_end, head, head + 1)
                start = tl.where(start < whole_end, start, whole_begin)
    head, index = group * R, 0
    for _ in range(0, (before + after) * R):
        start = tl.where(index < before, begin + index * BLOCK_Q, whole_end + (index - before) * BLOCK_Q)
        grad_key, grad_value = _key_value_tile(
            key, value, query_ptr, grad_out_ptr, lse_ptr, delta_ptr, strip_at, key_slots, key_mask, documents,
            start, head, q_h, q_n, do_h, do_n, Q, K, S, offset, scale, grad_key, grad_value,
            False, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_Q,
        )  # fmt: skip
        index += 1
        if IS_GROUPED:
            head = tl.where(index < before + after, head, head + 1)
            index = tl.where(index < before + after, index, 0)
    grad_key_ptr += batch * dk_b + group * dk_h
    grad_value_ptr += batch * dv_b + group * dv_h
    store_rows(grad_key_ptr, grad_key * scaling, first, K, dk_n, D, BLOCK_D, BLOCK_K)
    store_rows(grad_value_ptr, grad_value, first, K, dv_n, D, BLOCK_D, BLOCK_K)


@jit
def _grad_scores(
    query, grad_out, lse, delta, key_ptr, value_ptr, strip_at, query_slots, key_mask, documents, start,
    k_n, v_n, K, num_slots, scale,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """→ the keys from `start` on and the gradients of a tile's scores, with queries as rows."""
    key, value, scores = score_keys(
        query, key_ptr, value_ptr, strip_at, query_slots, key_mask, documents, start, k_n, v_n, K, num_slots,
        scale, WHOLE, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_K,
    )  # fmt: skip
    weights = exp2(scores - lse[:, None], PTX)
    grad_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
    return key, weights * (grad_weights - delta[:, None])


@jit
def _skew(tile, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """→ the tile with column (r + m) mod BLOCK_K of row r in column m, and r + m: what stood on one diagonal stands in
    one column, and each time that r + m wraps around begins another diagonal."""
    turned = tl.arange(0, BLOCK_Q)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    return tl.gather(tile, turned % BLOCK_K, 1), turned


@jit
def _add_diagonals(grad_scores, strip_at, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Adds the sums along the diagonals of a tile, whose corner belongs at `strip_at`, to the gradient of the strip."""
    skewed, turned = _skew(grad_scores, BLOCK_Q, BLOCK_K)
    lags = tl.arange(0, BLOCK_K)
    for wrap in tl.static_range((BLOCK_Q + BLOCK_K - 2) // BLOCK_K + 1):
        sums = tl.sum(tl.where(turned // BLOCK_K == wrap, skewed, 0.0), 0)
        tl.atomic_add(strip_at + (BLOCK_K * wrap - lags), sums, sem="relaxed")


@jit(do_not_specialize=SIZES)
def query_kernel(
    query_ptr, key_ptr, value_ptr, strip_ptr, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    grad_query_ptr, grad_strip_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, m_b, c_b, dq_b, dq_h, dq_n,
    H, R, Q, K, S, offset, origin, scale, scaling,
    ADD_TABLE: tl.constexpr,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of a block of queries; with ADD_TABLE, what they give to that of the strip, in no fixed order."""
    num_blocks = tl.cdiv(Q, BLOCK_Q)
    block, head, batch = locate(num_blocks, H)
    first = (num_blocks - 1 - block) * BLOCK_Q
    query = load_rows(query_ptr + batch * q_b + head * q_h, first, Q, q_n, True, WIDEN, D, BLOCK_D, BLOCK_Q)
    grad_out = load_rows(grad_out_ptr + batch * do_b + head * do_h, first, Q, do_n, True, WIDEN, D, BLOCK_D, BLOCK_Q)
    numbers = (batch * H + head) * Q
    lse, delta = _row_numbers(lse_ptr + numbers, delta_ptr + numbers, first, Q, True, BLOCK_Q)
    key_ptr += batch * k_b + head // R * k_h
    value_ptr += batch * v_b + head // R * v_h
    key_mask, documents = mask_ptr + batch * m_b, documents_ptr + batch * c_b
    rows, columns = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_K)
    query_slots = (offset + first + rows)[:, None]
    corner = head * S + origin + first
    strip_at = strip_ptr + corner + (rows.to(tl.int64)[:, None] - columns.to(tl.int64)[None, :])
    grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    begin, whole_begin, whole_end, before, after = split_keys(
        first, offset, Q, K, IS_CAUSAL, HAS_MASK or HAS_DOCUMENTS, WINDOW, BLOCK_Q, BLOCK_K
    )
    if not (HAS_MASK or HAS_DOCUMENTS):
        for start in range(whole_begin, whole_end, BLOCK_K):
            key, grad_scores = _grad_scores(
                query, grad_out, lse, delta, key_ptr, value_ptr, strip_at - start, query_slots, key_mask, documents,
                start, k_n, v_n, K, offset + Q, scale,
                True, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_K,
            )  # fmt: skip
            grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
            if ADD_TABLE:
                _add_diagonals(grad_scores, grad_strip_ptr + corner - start, BLOCK_Q, BLOCK_K)
    for index in range(0, before + after):
        start = tl.where(index < before, begin + index * BLOCK_K, whole_end + (index - before) * BLOCK_K)
        key, grad_scores = _grad_scores(
            query, grad_out, lse, delta, key_ptr, value_ptr, strip_at - start, query_slots, key_mask, documents,
            start, k_n, v_n, K, offset + Q, scale,
            False, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK_K,
        )  # fmt: skip
        grad_query = tl.dot(grad_scores.to(key.dtype), key, grad_query, input_precision=PRECISION)
        if ADD_TABLE:
            _add_diagonals(grad_scores, grad_strip_ptr + corner - start, BLOCK_Q, BLOCK_K)
    grad_query_ptr += batch * dq_b + head * dq_h
    store_rows(grad_query_ptr, grad_query * scaling, first, Q, dq_n, D, BLOCK_D, BLOCK_Q)


@jit
def _table_tile(
    query_ptr, key_ptr, value_ptr, strip_at, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
    q_b, q_n, k_b, k_n, v_b, v_n, do_b, do_n, m_b, c_b,
    batch, head, first, start, H, Q, K, offset, scale,
    WHOLE: tl.constexpr, IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the scores of the tile with the queries from `first` and the keys from `start` on."""
    query = load_rows(query_ptr + batch * q_b, first, Q, q_n, not WHOLE, WIDEN, D, BLOCK_D, BLOCK)
    grad_out = load_rows(grad_out_ptr + batch * do_b, first, Q, do_n, not WHOLE, WIDEN, D, BLOCK_D, BLOCK)
    numbers = (batch * H + head) * Q
    lse, delta = _row_numbers(lse_ptr + numbers, delta_ptr + numbers, first, Q, not WHOLE, BLOCK)
    query_slots = (offset + first + tl.arange(0, BLOCK))[:, None]
    _, grad_scores = _grad_scores(
        query, grad_out, lse, delta, key_ptr + batch * k_b, value_ptr + batch * v_b, strip_at, query_slots,
        mask_ptr + batch * m_b, documents_ptr + batch * c_b, start, k_n, v_n, K, offset + Q, scale,
        WHOLE, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK,
    )  # fmt: skip
    return grad_scores


@jit(do_not_specialize=[*SIZES, "B", "lowest", "num_diagonals", "shares"])
def table_kernel(
    query_ptr, key_ptr, value_ptr, strip_ptr, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr, sums_ptr,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, do_b, do_h, do_n, m_b, c_b,
    H, R, Q, K, S, offset, origin, scale, B, lowest, num_diagonals, shares,
    IS_CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr, PTX: tl.constexpr, WIDEN: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of the diagonals of all tiles of one head on one diagonal of tiles, row block − key block.

    Programs share the tiles of all batch rows out among them; each adds its own in a fixed order. Of the 2 · BLOCK
    sums, number BLOCK · wrap + m is at distance offset + BLOCK · (diagonal + wrap) − m.
    """
    index, head, share = locate(num_diagonals, H)
    diagonal = index + lowest
    query_ptr += head * q_h
    grad_out_ptr += head * do_h
    key_ptr += head // R * k_h
    value_ptr += head // R * v_h
    lags = tl.arange(0, BLOCK)
    strip_at = strip_ptr + head * S + origin + diagonal * BLOCK
    strip_at = strip_at + (lags.to(tl.int64)[:, None] - lags.to(tl.int64)[None, :])
    begin = tl.maximum(diagonal, 0)
    num_tiles = tl.maximum(tl.minimum(tl.cdiv(Q, BLOCK), tl.cdiv(K, BLOCK) + diagonal) - begin, 0)
    num_whole = num_tiles * 0
    if not (HAS_MASK or HAS_DOCUMENTS):
        num_whole = tl.maximum(tl.minimum(Q // BLOCK, K // BLOCK + diagonal) - begin, 0)
        nearest, farthest = offset + diagonal * BLOCK - (BLOCK - 1), offset + diagonal * BLOCK + (BLOCK - 1)
        if IS_CAUSAL:
            num_whole = tl.where(nearest < 0, 0, num_whole)
        if WINDOW > 0:
            num_whole = tl.where(farthest >= WINDOW, 0, num_whole)
    sums = tl.zeros([BLOCK, BLOCK], tl.float32)
    if not (HAS_MASK or HAS_DOCUMENTS):
        for tile in range(tl.cast(share, tl.int32), B * num_whole, shares):
            block = begin + tile % num_whole
            sums += _table_tile(
                query_ptr, key_ptr, value_ptr, strip_at, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
                q_b, q_n, k_b, k_n, v_b, v_n, do_b, do_n, m_b, c_b, tl.cast(tile // num_whole, tl.int64), head,
                block * BLOCK, (block - diagonal) * BLOCK, H, Q, K, offset, scale,
                True, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK,
            )  # fmt: skip
    num_others = num_tiles - num_whole
    for tile in range(tl.cast(share, tl.int32), B * num_others, shares):
        block = begin + num_whole + tile % num_others
        sums += _table_tile(
            query_ptr, key_ptr, value_ptr, strip_at, mask_ptr, documents_ptr, grad_out_ptr, lse_ptr, delta_ptr,
            q_b, q_n, k_b, k_n, v_b, v_n, do_b, do_n, m_b, c_b, tl.cast(tile // num_others, tl.int64), head,
            block * BLOCK, (block - diagonal) * BLOCK, H, Q, K, offset, scale,
            False, IS_CAUSAL, HAS_MASK, HAS_DOCUMENTS, WINDOW, PRECISION, PTX, WIDEN, D, BLOCK_D, BLOCK,
        )  # fmt: skip
    skewed, turned = _skew(sums, BLOCK, BLOCK)
    sums_ptr += ((index * H + head) * shares + share) * 2 * BLOCK
    for wrap in tl.static_range(2):
        tl.store(sums_ptr + wrap * BLOCK + lags, tl.sum(tl.where(turned // BLOCK == wrap, skewed, 0.0), 0))
