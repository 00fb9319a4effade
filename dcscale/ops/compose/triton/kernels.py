"""Triton kernels that compose the scores or probabilities of a chunk, tile by tile, in registers.

A program owns one tile of queries by keys and loops over the heads twice. The first loop sums the latents, the matrices
without a head axis inside the low-rank terms (2R of them, float32, in registers). The second composes each head and, in
backward, also reduces it to the tile's partial sums of the gradients of the weights. Each tile writes its partial sums
to its own memory, and they are added afterwards in a fixed order: no atomics, so two runs give the same bits. Matrix
products are left to cuBLAS, between the kernels: there is no ``tl.dot`` here, so the miscompilation of products with an
operand in registers (see self_test.py) cannot occur.

Formulas: DCMHA, arXiv 2405.08553, section 3, and their gradients.

Axes in names: T queries and S keys of a tile. In memory, everything is contiguous except for the padding of rows:
scores, probabilities and their gradients
          [rows, heads, queries, row_stride], of one chunk. A row is a block of queries of a batch row. A batch row has
          ``blocks`` consecutive ones; the keys of each block start as many positions after those of the block before
          as it has queries. Keys are padded to a multiple of BLOCK_S, so that loads need no mask along keys and stay
          wide; the padding holds garbage. No query sees a key before position ``first_visible``; k and v are 0 there,
          also at the negative positions that the first blocks reach.
weights   [B, heads, 2R + 1, positions], float32: R rows w1 (heads to latents), R rows w2 (latents to heads), and the
          gate. Absent weights have no rows; RANK or GATE is 0 then.
partials  of sums along keys [rows, tiles along keys, heads, rows of the weights, queries], of sums along queries
          [rows, tiles along queries, heads, rows of the weights, row_stride]; finish_statistics and reduce_partials
          add them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Values of STEP: what compose_forward reads and writes.
SCORES_TO_LOGITS = tl.constexpr(0)
SCORES_TO_PROBABILITIES = tl.constexpr(1)
LOGITS_TO_COMPOSED = tl.constexpr(2)

# Values of AXIS: which positions the weights belong to. It is also the axis that they broadcast along.
BY_QUERY = tl.constexpr(1)
BY_KEY = tl.constexpr(0)

# Values of FACTOR: the first factor of a low-rank term maps heads to latents, the second latents to heads.
W1 = tl.constexpr(0)
W2 = tl.constexpr(1)

# These change from chunk to chunk. Specializing on values of 1 or multiples of 16 would only compile more variants.
_UNSPECIALIZED = [
    "queries",
    "keys",
    "blocks",
    "first_row",
    "first_query",
    "first_key",
    "query_offset",
    "total_queries",
    "total_keys",
    "first_visible",
    "window",
]


@triton.jit
def _tile(queries, first_query, first_key, query_offset, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The program's queries and keys, counted within the chunk, and whether any query may see any key."""
    tile_s, tile_t = tl.program_id(0), tl.program_id(1)
    first_position = query_offset + first_query + tile_t * BLOCK_T
    last_position = query_offset + first_query + tl.minimum((tile_t + 1) * BLOCK_T, queries) - 1
    first_s = first_key + tile_s * BLOCK_S
    # Some key is not after the last query, and some key is within the first query's window.
    visible = (first_s <= last_position) & (first_s + BLOCK_S > first_position - window + 1)
    return tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_s * BLOCK_S + tl.arange(0, BLOCK_S), visible


@triton.jit
def _zeros(RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """RANK latents of 0; one for a rank of 0, which is not used."""
    zero_TS = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    zeros = (zero_TS,)
    for _ in tl.static_range(RANK - 1):
        zeros = zeros + (zero_TS,)  # noqa: RUF005
    return zeros


@triton.jit
def _weight(weights_ptr, row, positions, total, valid, AXIS: tl.constexpr):
    """A row of a head's weights, as a column (BY_QUERY) or row (BY_KEY) that broadcasts over the tile."""
    return tl.expand_dims(tl.load(weights_ptr + row * total + positions, mask=valid, other=0.0), AXIS)


@triton.jit
def _add_latents(
    latents, x_TS, weights_ptr, positions, total, valid, FACTOR: tl.constexpr, RANK: tl.constexpr, AXIS: tl.constexpr
):
    """latents[r] + w[r] x for each r, where w is W1 or, for the latents of gradients, W2."""
    w = _weight(weights_ptr, FACTOR * RANK, positions, total, valid, AXIS)
    sums = (latents[0] + w * x_TS,)
    for r in tl.static_range(1, RANK):
        w = _weight(weights_ptr, FACTOR * RANK + r, positions, total, valid, AXIS)
        sums = sums + (latents[r] + w * x_TS,)  # noqa: RUF005
    return sums


@triton.jit
def _add_compose(
    y_TS,
    x_TS,
    latents,
    weights_ptr,
    positions,
    total,
    valid,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """y + gate x + sum_r w[r] latents[r], where w is W2 or, for gradients, W1."""
    if GATE:
        y_TS += _weight(weights_ptr, 2 * RANK, positions, total, valid, AXIS) * x_TS
    for r in tl.static_range(RANK):
        y_TS += _weight(weights_ptr, FACTOR * RANK + r, positions, total, valid, AXIS) * latents[r]
    return y_TS


@triton.jit
def _store_partials(
    partials_ptr,
    x_TS,
    dy_TS,
    latents,
    dlatents,
    positions,
    total,
    valid,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The tile's partial sums of the gradients of a head's weights: dw1 = sum x dlatent, dw2 = sum dy latent,
    dgate = sum x dy."""
    for r in tl.static_range(RANK):
        tl.store(partials_ptr + r * total + positions, tl.sum(x_TS * dlatents[r], AXIS), mask=valid)
        tl.store(partials_ptr + (RANK + r) * total + positions, tl.sum(dy_TS * latents[r], AXIS), mask=valid)
    if GATE:
        tl.store(partials_ptr + 2 * RANK * total + positions, tl.sum(x_TS * dy_TS, AXIS), mask=valid)


@triton.jit
def _softmax(logits_TS, statistics_ptr, total, valid):
    """Probabilities from logits and the statistics of their rows."""
    max_T = tl.load(statistics_ptr, mask=valid, other=0.0)
    log_sum_T = tl.load(statistics_ptr + total, mask=valid, other=0.0)
    # Two subtractions: max + log_sum would be rounded to the size of the max.
    return tl.exp((logits_TS - max_T[:, None]) - log_sum_T[:, None])


@triton.jit
def _load_x_dy(x_ptr, gradient_ptr, probabilities_ptr, delta_ptr, in_t, in_s, POST: tl.constexpr):
    """x and dy of a head, for the backward pass of y = compose(x)."""
    x_TS = tl.load(x_ptr, mask=in_t[:, None], other=0.0).to(tl.float32)
    dy_TS = tl.load(gradient_ptr, mask=in_t[:, None], other=0.0).to(tl.float32)
    # Columns past the last key are not written by the GEMM (of dy in post, of x in pre) and may hold NaN/Inf, so mask
    # them. The other operand was written by a kernel and is 0 there.
    if POST:
        dy_TS = tl.where(in_s[None, :], dy_TS, 0.0)
    else:
        x_TS = tl.where(in_s[None, :], x_TS, 0.0)
        # Gradient of the softmax: dlogits = P (dP - delta)
        delta_T = tl.load(delta_ptr, mask=in_t, other=0.0)
        probabilities_TS = tl.load(probabilities_ptr, mask=in_t[:, None], other=0.0).to(tl.float32)
        dy_TS = probabilities_TS * (dy_TS - delta_T[:, None])
    return x_TS, dy_TS


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def compose_forward(
    x_ptr,
    out_ptr,
    statistics_ptr,
    partials_ptr,
    query_weights_ptr,
    key_weights_ptr,
    documents_ptr,
    queries,
    keys,
    blocks,
    row_stride,
    first_row,
    first_query,
    first_key,
    query_offset,
    total_queries,
    total_keys,
    first_visible,
    window,
    STEP: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    QUERY_GATE: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One compose of a chunk, and the half of the softmax that goes with it.

    SCORES_TO_LOGITS (pre): out = compose(x), -inf where a query does not see a key; partials [rows, tiles along keys,
    heads, 2, queries] = the maximum of out over the tile's keys, and the sum of exp(out - maximum). out may be x.
    SCORES_TO_PROBABILITIES (pre, in backward): out = exp(compose(x) - max - log_sum), 0 where a query does not see a
    key, with statistics [B, heads, 2, queries] = max and log_sum over all keys.
    LOGITS_TO_COMPOSED (post): out = compose(exp(x - max - log_sum)).
    Tiles in which no query sees a key are skipped, except for the outputs that are read there: the partials and the
    composed probabilities.
    """
    tile_s, row = tl.program_id(0), tl.program_id(2)
    first_query += row % blocks * queries
    first_key += row % blocks * queries
    t, s, visible = _tile(queries, first_query, first_key, query_offset, window, BLOCK_T, BLOCK_S)
    in_t, in_s = t < queries, (s < keys) & (first_key + s >= first_visible)
    wide_t = in_t[:, None]
    # int64, because offsets may exceed 2^31 elements.
    batch = (first_row + row // blocks).to(tl.int64)
    head_stride = queries.to(tl.int64) * row_stride
    offset_TS = row * HEADS * head_stride + t[:, None] * row_stride + s[None, :]
    x_ptr += offset_TS
    out_ptr += offset_TS
    statistics_ptr += batch * HEADS * 2 * total_queries + first_query + t
    partials_ptr += (row.to(tl.int64) * tl.num_programs(0) + tile_s) * HEADS * 2 * queries + t
    QUERY_ROWS: tl.constexpr = 2 * QUERY_RANK + QUERY_GATE
    KEY_ROWS: tl.constexpr = 2 * KEY_RANK + KEY_GATE
    query_weights_ptr += batch * HEADS * QUERY_ROWS * total_queries + first_query
    key_weights_ptr += batch * HEADS * KEY_ROWS * total_keys + first_key

    if visible:
        # The mask; in LOGITS_TO_COMPOSED the logits already have it.
        if STEP != LOGITS_TO_COMPOSED:
            distance_TS = (query_offset + first_query + t)[:, None] - (first_key + s)[None, :]
            seen_TS = (distance_TS >= 0) & (distance_TS < window) & in_s[None, :]
            if DOCUMENTS:
                documents_ptr += batch * total_keys
                of_query = tl.load(documents_ptr + query_offset + first_query + t, mask=in_t, other=0)
                of_key = tl.load(documents_ptr + first_key + s, mask=in_s, other=0)
                seen_TS &= of_query[:, None] == of_key[None, :]

        # First loop over the heads: latent_r = sum_g w1[r, g] x[g], by query and by key.
        query_latents = _zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
        key_latents = _zeros(KEY_RANK, BLOCK_T, BLOCK_S)
        if QUERY_RANK + KEY_RANK > 0:
            for head in range(HEADS):
                x_TS = tl.load(x_ptr + head * head_stride, mask=wide_t, other=0.0)
                if STEP == LOGITS_TO_COMPOSED:
                    x_TS = _softmax(x_TS, statistics_ptr + head * 2 * total_queries, total_queries, in_t)
                if QUERY_RANK > 0:
                    by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
                    query_latents = _add_latents(
                        query_latents, x_TS, by_query_ptr, t, total_queries, in_t, W1, QUERY_RANK, BY_QUERY
                    )
                if KEY_RANK > 0:
                    by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
                    key_latents = _add_latents(key_latents, x_TS, by_key_ptr, s, total_keys, in_s, W1, KEY_RANK, BY_KEY)

        # Second loop: y[h] = x[h] (1 + gates) + sum_r w2[r, h] latent_r.
        for head in range(HEADS):
            # Loaded again, from L2: x of all heads does not fit into registers.
            x_TS = tl.load(x_ptr + head * head_stride, mask=wide_t, other=0.0)
            if STEP == LOGITS_TO_COMPOSED:
                x_TS = _softmax(x_TS, statistics_ptr + head * 2 * total_queries, total_queries, in_t)
            by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
            by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
            y_TS = _add_compose(
                x_TS, x_TS, query_latents, by_query_ptr, t, total_queries, in_t, W2, QUERY_RANK, QUERY_GATE, BY_QUERY
            )
            y_TS = _add_compose(
                y_TS, x_TS, key_latents, by_key_ptr, s, total_keys, in_s, W2, KEY_RANK, KEY_GATE, BY_KEY
            )
            if STEP == SCORES_TO_LOGITS:
                # The tile's part of an online softmax. A row without a visible key has a maximum of -inf; subtract 0
                # there, because -inf - (-inf) is NaN.
                y_TS = tl.where(seen_TS, y_TS, float("-inf"))
                max_T = tl.max(y_TS, 1)
                finite_max_T = tl.where(max_T == float("-inf"), 0.0, max_T)
                sum_T = tl.sum(tl.exp(y_TS - finite_max_T[:, None]), 1)
                tl.store(partials_ptr + head * 2 * queries, max_T, mask=in_t)
                tl.store(partials_ptr + (head * 2 + 1) * queries, sum_T, mask=in_t)
            if STEP == SCORES_TO_PROBABILITIES:
                y_TS = _softmax(y_TS, statistics_ptr + head * 2 * total_queries, total_queries, in_t)
                y_TS = tl.where(seen_TS, y_TS, 0.0)
            tl.store(out_ptr + head * head_stride, y_TS.to(out_ptr.dtype.element_ty), mask=wide_t)
    else:
        if STEP == SCORES_TO_LOGITS:
            # The neutral element of the softmax statistics, which are combined over all tiles.
            for head in range(HEADS):
                tl.store(partials_ptr + head * 2 * queries, tl.full([BLOCK_T], float("-inf"), tl.float32), mask=in_t)
                tl.store(partials_ptr + (head * 2 + 1) * queries, tl.zeros([BLOCK_T], tl.float32), mask=in_t)
        if STEP == LOGITS_TO_COMPOSED:
            # The GEMM with v reads all keys of the chunk.
            for head in range(HEADS):
                zero_TS = tl.zeros([BLOCK_T, BLOCK_S], out_ptr.dtype.element_ty)
                tl.store(out_ptr + head * head_stride, zero_TS, mask=wide_t)


@triton.jit(do_not_specialize=_UNSPECIALIZED)
def compose_backward(
    x_ptr,
    gradient_ptr,
    probabilities_ptr,
    delta_ptr,
    operand_ptr,
    query_partials_ptr,
    key_partials_ptr,
    query_weights_ptr,
    key_weights_ptr,
    queries,
    keys,
    blocks,
    row_stride,
    first_row,
    first_query,
    first_key,
    query_offset,
    total_queries,
    total_keys,
    first_visible,
    window,
    POST: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    QUERY_GATE: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Backward pass of one y = compose(x) of a chunk: dx, and the tile's partial sums of the weights' gradients.

    POST: x = probabilities, dy = gradient. Writes dx to gradient, y to operand (of the product with dout), and delta
    [rows, tiles along keys, heads, queries] = the sum of x dx over the tile's keys, from the softmax's gradient.
    Pre: x = scores, dy = probabilities (gradient - delta), with delta [rows, heads, queries] over all keys. Writes dx
    to operand (of the products with q and k).
    In tiles in which no query sees a key all outputs are 0, except for gradient, which is not touched.
    """
    tile_s, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query += row % blocks * queries
    first_key += row % blocks * queries
    t, s, visible = _tile(queries, first_query, first_key, query_offset, window, BLOCK_T, BLOCK_S)
    in_t, in_s = t < queries, (s < keys) & (first_key + s >= first_visible)
    wide_t = in_t[:, None]
    # int64, because offsets may exceed 2^31 elements.
    batch = (first_row + row // blocks).to(tl.int64)
    head_stride = queries.to(tl.int64) * row_stride
    offset_TS = row * HEADS * head_stride + t[:, None] * row_stride + s[None, :]
    x_ptr += offset_TS
    gradient_ptr += offset_TS
    probabilities_ptr += offset_TS
    operand_ptr += offset_TS
    along_keys = row.to(tl.int64) * tl.num_programs(0) + tile_s
    along_queries = row.to(tl.int64) * tl.num_programs(1) + tile_t
    if POST:
        delta_ptr += along_keys * HEADS * queries + t
    else:
        delta_ptr += row.to(tl.int64) * HEADS * queries + t
    QUERY_ROWS: tl.constexpr = 2 * QUERY_RANK + QUERY_GATE
    KEY_ROWS: tl.constexpr = 2 * KEY_RANK + KEY_GATE
    query_partials_ptr += along_keys * HEADS * QUERY_ROWS * queries
    key_partials_ptr += along_queries * HEADS * KEY_ROWS * row_stride
    query_weights_ptr += batch * HEADS * QUERY_ROWS * total_queries + first_query
    key_weights_ptr += batch * HEADS * KEY_ROWS * total_keys + first_key

    if visible:
        # First loop over the heads: latent_r = sum_g w1[r, g] x[g], and its gradient dlatent_r = sum_h w2[r, h] dy[h].
        query_latents = _zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
        query_dlatents = _zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
        key_latents = _zeros(KEY_RANK, BLOCK_T, BLOCK_S)
        key_dlatents = _zeros(KEY_RANK, BLOCK_T, BLOCK_S)
        if QUERY_RANK + KEY_RANK > 0:
            for head in range(HEADS):
                offset = head * head_stride
                x_TS, dy_TS = _load_x_dy(
                    x_ptr + offset,
                    gradient_ptr + offset,
                    probabilities_ptr + offset,
                    delta_ptr + head * queries,
                    in_t,
                    in_s,
                    POST,
                )
                if QUERY_RANK > 0:
                    by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
                    query_latents = _add_latents(
                        query_latents, x_TS, by_query_ptr, t, total_queries, in_t, W1, QUERY_RANK, BY_QUERY
                    )
                    query_dlatents = _add_latents(
                        query_dlatents, dy_TS, by_query_ptr, t, total_queries, in_t, W2, QUERY_RANK, BY_QUERY
                    )
                if KEY_RANK > 0:
                    by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
                    key_latents = _add_latents(key_latents, x_TS, by_key_ptr, s, total_keys, in_s, W1, KEY_RANK, BY_KEY)
                    key_dlatents = _add_latents(
                        key_dlatents, dy_TS, by_key_ptr, s, total_keys, in_s, W2, KEY_RANK, BY_KEY
                    )

        # Second loop: the weights' gradients, and dx[h] = dy[h] (1 + gates) + sum_r w1[r, h] dlatent_r.
        for head in range(HEADS):
            offset = head * head_stride
            x_TS, dy_TS = _load_x_dy(
                x_ptr + offset,
                gradient_ptr + offset,
                probabilities_ptr + offset,
                delta_ptr + head * queries,
                in_t,
                in_s,
                POST,
            )
            _store_partials(
                query_partials_ptr + head * QUERY_ROWS * queries,
                x_TS,
                dy_TS,
                query_latents,
                query_dlatents,
                t,
                queries,
                in_t,
                QUERY_RANK,
                QUERY_GATE,
                BY_QUERY,
            )
            # All columns are stored, the padding past the last key too: reduce_partials skips it.
            _store_partials(
                key_partials_ptr + head * KEY_ROWS * row_stride,
                x_TS,
                dy_TS,
                key_latents,
                key_dlatents,
                s,
                row_stride,
                s < row_stride,
                KEY_RANK,
                KEY_GATE,
                BY_KEY,
            )
            by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
            by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
            dx_TS = _add_compose(
                dy_TS, dy_TS, query_dlatents, by_query_ptr, t, total_queries, in_t, W1, QUERY_RANK, QUERY_GATE, BY_QUERY
            )
            dx_TS = _add_compose(
                dx_TS, dy_TS, key_dlatents, by_key_ptr, s, total_keys, in_s, W1, KEY_RANK, KEY_GATE, BY_KEY
            )
            if POST:
                # delta = sum_s P dP, and y = compose(x) again for dv = y^T dout.
                tl.store(delta_ptr + head * queries, tl.sum(x_TS * dx_TS, 1), mask=in_t)
                tl.store(gradient_ptr + offset, dx_TS.to(gradient_ptr.dtype.element_ty), mask=wide_t)
                out_TS = _add_compose(
                    x_TS,
                    x_TS,
                    query_latents,
                    by_query_ptr,
                    t,
                    total_queries,
                    in_t,
                    W2,
                    QUERY_RANK,
                    QUERY_GATE,
                    BY_QUERY,
                )
                out_TS = _add_compose(
                    out_TS, x_TS, key_latents, by_key_ptr, s, total_keys, in_s, W2, KEY_RANK, KEY_GATE, BY_KEY
                )
            else:
                out_TS = dx_TS
            tl.store(operand_ptr + offset, out_TS.to(operand_ptr.dtype.element_ty), mask=wide_t)
    else:
        # Sums and products run over all tiles, so write zeros.
        for head in range(HEADS):
            zero_T = tl.zeros([BLOCK_T], tl.float32)
            zero_S = tl.zeros([BLOCK_S], tl.float32)
            if POST:
                tl.store(delta_ptr + head * queries, zero_T, mask=in_t)
            for r in tl.static_range(QUERY_ROWS):
                tl.store(query_partials_ptr + (head * QUERY_ROWS + r) * queries + t, zero_T, mask=in_t)
            for r in tl.static_range(KEY_ROWS):
                tl.store(key_partials_ptr + (head * KEY_ROWS + r) * row_stride + s, zero_S)
            zero_TS = tl.zeros([BLOCK_T, BLOCK_S], operand_ptr.dtype.element_ty)
            tl.store(operand_ptr + head * head_stride, zero_TS, mask=wide_t)


@triton.jit(do_not_specialize=["queries", "tiles", "blocks", "first_row", "first_query", "total_queries"])
def finish_statistics(
    partials_ptr,
    statistics_ptr,
    queries,
    tiles,
    blocks,
    first_row,
    first_query,
    total_queries,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The maximum of each row of logits and log(sum(exp(logit - maximum))), from compose_forward's partials."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, row = tl.program_id(1), tl.program_id(2)
    in_t = t < queries
    partials_ptr += (row.to(tl.int64) * tiles * HEADS + head) * 2 * queries + t
    tile_stride = HEADS * 2 * queries
    # max = max over tiles of max_tile
    max_T = tl.full([BLOCK], float("-inf"), tl.float32)
    for tile in range(tiles):
        max_T = tl.maximum(max_T, tl.load(partials_ptr + tile * tile_stride, mask=in_t, other=0.0))
    # sum = sum over tiles of exp(max_tile - max) sum_tile
    sum_T = tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        of_tile_T = tl.load(partials_ptr + tile * tile_stride, mask=in_t, other=0.0)
        sum_T += tl.exp(of_tile_T - max_T) * tl.load(partials_ptr + tile * tile_stride + queries, mask=in_t, other=1.0)
    batch = (first_row + row // blocks).to(tl.int64)
    statistics_ptr += (batch * HEADS + head) * 2 * total_queries + first_query + row % blocks * queries + t
    tl.store(statistics_ptr, max_T, mask=in_t)
    tl.store(statistics_ptr + total_queries, tl.log(sum_T), mask=in_t)


@triton.jit(do_not_specialize=["width", "step", "tiles", "blocks", "first_row", "first", "stride", "total"])
def reduce_partials(
    partials_ptr,
    sums_ptr,
    width,
    step,
    tiles,
    blocks,
    first_row,
    first,
    stride,
    total,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums [B, lines, total] = the sum of partials [rows, tiles, lines, stride] over tiles, plus sums if ADD.

    Only the first ``width`` positions of each line are valid. Those of block b of a batch row are the positions
    first + b step + (0 ... width - 1) of its sums; where blocks overlap, they are added in order. Positions before 0
    are skipped. With more than one block, step is a multiple of BLOCK, and width of step.
    """
    start = tl.program_id(0) * BLOCK
    line, row, lines = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    position = start + tl.arange(0, BLOCK)
    valid = (position < (blocks - 1) * step + width) & (first + position >= 0)
    tile_stride = lines.to(tl.int64) * stride
    # The blocks that overlap these positions.
    last_block = tl.minimum(start // step, blocks - 1)
    first_block = 0
    if start >= width:
        first_block = (start - width) // step + 1
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(first_block, last_block + 1):
        within = position - block * step
        block_ptr = partials_ptr + (row * blocks + block) * tiles * tile_stride + line * stride + within
        for tile in range(tiles):
            sums += tl.load(block_ptr + tile * tile_stride, mask=valid & (within < width), other=0.0)
    sums_ptr += ((first_row + row).to(tl.int64) * lines + line) * total + first + position
    if ADD:
        sums += tl.load(sums_ptr, mask=valid, other=0.0)
    tl.store(sums_ptr, sums, mask=valid)
