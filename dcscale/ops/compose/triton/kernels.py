"""Tile kernels of compose attention: the heads of a tile of maps are mixed in registers, one head after the other.

A program owns one tile of queries by keys and goes over the heads twice. The first pass sums the latents, the maps
without a head axis through which heads meet (2R of them, float32, in registers). The second mixes each head and, in
backward, also reduces it to the tile's part of the gradients of the weights. Every part has a place of its own and is
added up afterwards in a fixed order: no atomics, so the same bits every time. Matrix products are left to cuBLAS,
between the kernels: there is no ``tl.dot`` here, and so not the miscompiled one with an operand in registers.

Formulas: DCMHA, arXiv 2405.08553, section 3, and their gradients.

Axes in names: T queries and S keys of a tile. Memory, each contiguous but for the rows of maps:
maps      [rows, heads, queries, row_stride], one chunk. A row is a block of queries of a batch row: ``blocks`` of them
          follow one another, and the keys of each begin as many positions after those of the one before as it has
          queries. The keys fill each row up to a multiple of BLOCK_S, so that loads need no mask along keys and stay
          wide. What is behind the keys is garbage. Nobody sees a key before position ``first_seen``; k and v are 0
          there, and there are such positions before 0.
weights   [B, heads, 2R + 1, positions], float32: the R rows of the factor into the latents, the R of the factor out of
          them, and the gate. A rank of 0 and a gate of 0 stand for absent ones, which have no rows.
parts     of sums along keys [rows, tiles along keys, heads, rows of the weights, queries], of sums along queries
          [rows, tiles along queries, heads, rows of the weights, row_stride]; add_parts and finish_statistics add up.
"""

from __future__ import annotations

import triton
import triton.language as tl

SCORES_TO_LOGITS = 0
SCORES_TO_PROBABILITIES = 1
LOGITS_TO_MIXED = 2

# They change from chunk to chunk; a variant of the kernel for each that is 1 or a multiple of 16 would gain nothing.
_CHANGING = [
    "queries",
    "keys",
    "blocks",
    "first_row",
    "first_query",
    "first_key",
    "query_offset",
    "total_queries",
    "total_keys",
    "first_seen",
    "window",
]


@triton.jit
def _tile(queries, first_query, first_key, query_offset, window, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The program's queries and keys, counted within the chunk, and whether any of them sees another."""
    tile_s, tile_t = tl.program_id(0), tl.program_id(1)
    first_position = query_offset + first_query + tile_t * BLOCK_T
    last_position = query_offset + first_query + tl.minimum((tile_t + 1) * BLOCK_T, queries) - 1
    first_s = first_key + tile_s * BLOCK_S
    reached = (first_s <= last_position) & (first_s + BLOCK_S > first_position - window + 1)
    return tile_t * BLOCK_T + tl.arange(0, BLOCK_T), tile_s * BLOCK_S + tl.arange(0, BLOCK_S), reached


@triton.jit
def _zeros(RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Latents to begin with; one that is not used for a rank of 0."""
    zero_TS = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    zeros = (zero_TS,)
    for _ in tl.static_range(RANK - 1):
        zeros = zeros + (zero_TS,)  # noqa: RUF005
    return zeros


@triton.jit
def _weight(weights_ptr, row, positions, total, there, AXIS: tl.constexpr):
    """A row of a head's weights, with a new axis of size 1."""
    return tl.expand_dims(tl.load(weights_ptr + row * total + positions, mask=there, other=0.0), AXIS)


@triton.jit
def _add_latents(
    latents, x_TS, weights_ptr, positions, total, there, FACTOR: tl.constexpr, RANK: tl.constexpr, AXIS: tl.constexpr
):
    """latents[r] + w[r] x, w being the factor 0, into the latents, or 1, out of them."""
    w = _weight(weights_ptr, FACTOR * RANK, positions, total, there, AXIS)
    sums = (latents[0] + w * x_TS,)
    for r in tl.static_range(1, RANK):
        w = _weight(weights_ptr, FACTOR * RANK + r, positions, total, there, AXIS)
        sums = sums + (latents[r] + w * x_TS,)  # noqa: RUF005
    return sums


@triton.jit
def _add_mix(
    y_TS,
    x_TS,
    latents,
    weights_ptr,
    positions,
    total,
    there,
    FACTOR: tl.constexpr,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """y + gate x + sum_r w[r] latents[r], w as in :func:`_add_latents`."""
    if GATE:
        y_TS += _weight(weights_ptr, 2 * RANK, positions, total, there, AXIS) * x_TS
    for r in tl.static_range(RANK):
        y_TS += _weight(weights_ptr, FACTOR * RANK + r, positions, total, there, AXIS) * latents[r]
    return y_TS


@triton.jit
def _store_parts(
    parts_ptr,
    x_TS,
    dy_TS,
    latents,
    dlatents,
    positions,
    total,
    there,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    AXIS: tl.constexpr,
):
    """The tile's part of the gradients of a head's weights, row by row."""
    for r in tl.static_range(RANK):
        tl.store(parts_ptr + r * total + positions, tl.sum(x_TS * dlatents[r], AXIS), mask=there)
        tl.store(parts_ptr + (RANK + r) * total + positions, tl.sum(dy_TS * latents[r], AXIS), mask=there)
    if GATE:
        tl.store(parts_ptr + 2 * RANK * total + positions, tl.sum(x_TS * dy_TS, AXIS), mask=there)


@triton.jit
def _probabilities(logits_TS, statistics_ptr, total, there):
    peak_T = tl.load(statistics_ptr, mask=there, other=0.0)
    log_sum_T = tl.load(statistics_ptr + total, mask=there, other=0.0)
    return tl.exp((logits_TS - peak_T[:, None]) - log_sum_T[:, None])


@triton.jit
def _load_backward(maps_ptr, gradient_ptr, probabilities_ptr, delta_ptr, in_t, in_s, POST: tl.constexpr):
    """x and dy of a head. What lies behind the keys is not finite in maps that a matrix product wrote."""
    x_TS = tl.load(maps_ptr, mask=in_t[:, None], other=0.0).to(tl.float32)
    dy_TS = tl.load(gradient_ptr, mask=in_t[:, None], other=0.0).to(tl.float32)
    if POST:
        dy_TS = tl.where(in_s[None, :], dy_TS, 0.0)
    else:
        x_TS = tl.where(in_s[None, :], x_TS, 0.0)
        delta_T = tl.load(delta_ptr, mask=in_t, other=0.0)
        probabilities_TS = tl.load(probabilities_ptr, mask=in_t[:, None], other=0.0).to(tl.float32)
        dy_TS = probabilities_TS * (dy_TS - delta_T[:, None])
    return x_TS, dy_TS


@triton.jit(do_not_specialize=_CHANGING)
def mix_forward(
    maps_ptr,
    out_ptr,
    statistics_ptr,
    parts_ptr,
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
    first_seen,
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

    SCORES_TO_LOGITS (pre): out = compose(maps), -inf where a query does not see a key; parts [rows, tiles along keys,
    heads, 2, queries] = the peak of out over the tile's keys, and the sum of exp(out - peak). out may be maps.
    SCORES_TO_PROBABILITIES (pre, in backward): out = exp(compose(maps) - peak - log_sum), 0 where a query does not see
    a key, with statistics [B, heads, 2, queries] = peak and log_sum over all keys. (Their sum would be rounded to the
    size of the peak.)
    LOGITS_TO_MIXED (post): out = compose(exp(maps - peak - log_sum)).
    Tiles in which no query sees a key are left alone, but for the parts and the mixed probabilities, which are read.
    """
    tile_s, row = tl.program_id(0), tl.program_id(2)
    first_query += row % blocks * queries
    first_key += row % blocks * queries
    t, s, reached = _tile(queries, first_query, first_key, query_offset, window, BLOCK_T, BLOCK_S)
    in_t, in_s = t < queries, (s < keys) & (first_key + s >= first_seen)
    wide_t = in_t[:, None]
    batch = (first_row + row // blocks).to(tl.int64)
    head_stride = queries.to(tl.int64) * row_stride
    offset_TS = row * HEADS * head_stride + t[:, None] * row_stride + s[None, :]
    maps_ptr += offset_TS
    out_ptr += offset_TS
    statistics_ptr += batch * HEADS * 2 * total_queries + first_query + t
    parts_ptr += (row.to(tl.int64) * tl.num_programs(0) + tile_s) * HEADS * 2 * queries + t
    QUERY_ROWS: tl.constexpr = 2 * QUERY_RANK + QUERY_GATE
    KEY_ROWS: tl.constexpr = 2 * KEY_RANK + KEY_GATE
    query_weights_ptr += batch * HEADS * QUERY_ROWS * total_queries + first_query
    key_weights_ptr += batch * HEADS * KEY_ROWS * total_keys + first_key

    if reached:
        if STEP != 2:
            age_TS = (query_offset + first_query + t)[:, None] - (first_key + s)[None, :]
            seen_TS = (age_TS >= 0) & (age_TS < window) & in_s[None, :]
            if DOCUMENTS:
                documents_ptr += batch * total_keys
                of_query = tl.load(documents_ptr + query_offset + first_query + t, mask=in_t, other=0)
                of_key = tl.load(documents_ptr + first_key + s, mask=in_s, other=0)
                seen_TS &= of_query[:, None] == of_key[None, :]

        query_latents = _zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
        key_latents = _zeros(KEY_RANK, BLOCK_T, BLOCK_S)
        if QUERY_RANK + KEY_RANK > 0:
            for head in range(HEADS):
                x_TS = tl.load(maps_ptr + head * head_stride, mask=wide_t, other=0.0)
                if STEP == 2:
                    x_TS = _probabilities(x_TS, statistics_ptr + head * 2 * total_queries, total_queries, in_t)
                if QUERY_RANK > 0:
                    by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
                    query_latents = _add_latents(
                        query_latents, x_TS, by_query_ptr, t, total_queries, in_t, 0, QUERY_RANK, 1
                    )
                if KEY_RANK > 0:
                    by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
                    key_latents = _add_latents(key_latents, x_TS, by_key_ptr, s, total_keys, in_s, 0, KEY_RANK, 0)

        for head in range(HEADS):
            x_TS = tl.load(maps_ptr + head * head_stride, mask=wide_t, other=0.0)
            if STEP == 2:
                x_TS = _probabilities(x_TS, statistics_ptr + head * 2 * total_queries, total_queries, in_t)
            by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
            by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
            y_TS = _add_mix(
                x_TS, x_TS, query_latents, by_query_ptr, t, total_queries, in_t, 1, QUERY_RANK, QUERY_GATE, 1
            )
            y_TS = _add_mix(y_TS, x_TS, key_latents, by_key_ptr, s, total_keys, in_s, 1, KEY_RANK, KEY_GATE, 0)
            if STEP == 0:
                y_TS = tl.where(seen_TS, y_TS, float("-inf"))
                peak_T = tl.max(y_TS, 1)
                from_T = tl.where(peak_T == float("-inf"), 0.0, peak_T)
                sum_T = tl.sum(tl.exp(y_TS - from_T[:, None]), 1)
                tl.store(parts_ptr + head * 2 * queries, peak_T, mask=in_t)
                tl.store(parts_ptr + (head * 2 + 1) * queries, sum_T, mask=in_t)
            if STEP == 1:
                y_TS = _probabilities(y_TS, statistics_ptr + head * 2 * total_queries, total_queries, in_t)
                y_TS = tl.where(seen_TS, y_TS, 0.0)
            tl.store(out_ptr + head * head_stride, y_TS.to(out_ptr.dtype.element_ty), mask=wide_t)
    else:
        if STEP == 0:
            for head in range(HEADS):
                tl.store(parts_ptr + head * 2 * queries, tl.full([BLOCK_T], float("-inf"), tl.float32), mask=in_t)
                tl.store(parts_ptr + (head * 2 + 1) * queries, tl.zeros([BLOCK_T], tl.float32), mask=in_t)
        if STEP == 2:
            for head in range(HEADS):
                zero_TS = tl.zeros([BLOCK_T, BLOCK_S], out_ptr.dtype.element_ty)
                tl.store(out_ptr + head * head_stride, zero_TS, mask=wide_t)


@triton.jit(do_not_specialize=_CHANGING)
def mix_backward(
    maps_ptr,
    gradient_ptr,
    probabilities_ptr,
    delta_ptr,
    operand_ptr,
    query_parts_ptr,
    key_parts_ptr,
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
    first_seen,
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
    """The gradient of one compose y = compose(x) of a chunk: of x, and the tile's part of that of the weights.

    POST: x = maps (probabilities), dy = gradient. gradient = dx, operand = y, and delta [rows, tiles along keys, heads,
    queries] = the sum of x dx over the tile's keys, the row term of the softmax's gradient.
    Pre: x = maps (scores), dy = probabilities (gradient - delta), with delta [rows, heads, queries] over all keys.
    operand = dx.
    Where no query of a tile sees a key all of it is 0; gradient is not touched there.
    """
    tile_s, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_query += row % blocks * queries
    first_key += row % blocks * queries
    t, s, reached = _tile(queries, first_query, first_key, query_offset, window, BLOCK_T, BLOCK_S)
    in_t, in_s = t < queries, (s < keys) & (first_key + s >= first_seen)
    wide_t = in_t[:, None]
    batch = (first_row + row // blocks).to(tl.int64)
    head_stride = queries.to(tl.int64) * row_stride
    offset_TS = row * HEADS * head_stride + t[:, None] * row_stride + s[None, :]
    maps_ptr += offset_TS
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
    query_parts_ptr += along_keys * HEADS * QUERY_ROWS * queries
    key_parts_ptr += along_queries * HEADS * KEY_ROWS * row_stride
    query_weights_ptr += batch * HEADS * QUERY_ROWS * total_queries + first_query
    key_weights_ptr += batch * HEADS * KEY_ROWS * total_keys + first_key

    if reached:
        query_latents = _zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
        query_dlatents = _zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
        key_latents = _zeros(KEY_RANK, BLOCK_T, BLOCK_S)
        key_dlatents = _zeros(KEY_RANK, BLOCK_T, BLOCK_S)
        if QUERY_RANK + KEY_RANK > 0:
            for head in range(HEADS):
                map_at = head * head_stride
                x_TS, dy_TS = _load_backward(
                    maps_ptr + map_at,
                    gradient_ptr + map_at,
                    probabilities_ptr + map_at,
                    delta_ptr + head * queries,
                    in_t,
                    in_s,
                    POST,
                )
                if QUERY_RANK > 0:
                    by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
                    query_latents = _add_latents(
                        query_latents, x_TS, by_query_ptr, t, total_queries, in_t, 0, QUERY_RANK, 1
                    )
                    query_dlatents = _add_latents(
                        query_dlatents, dy_TS, by_query_ptr, t, total_queries, in_t, 1, QUERY_RANK, 1
                    )
                if KEY_RANK > 0:
                    by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
                    key_latents = _add_latents(key_latents, x_TS, by_key_ptr, s, total_keys, in_s, 0, KEY_RANK, 0)
                    key_dlatents = _add_latents(key_dlatents, dy_TS, by_key_ptr, s, total_keys, in_s, 1, KEY_RANK, 0)

        for head in range(HEADS):
            map_at = head * head_stride
            x_TS, dy_TS = _load_backward(
                maps_ptr + map_at,
                gradient_ptr + map_at,
                probabilities_ptr + map_at,
                delta_ptr + head * queries,
                in_t,
                in_s,
                POST,
            )
            _store_parts(
                query_parts_ptr + head * QUERY_ROWS * queries,
                x_TS,
                dy_TS,
                query_latents,
                query_dlatents,
                t,
                queries,
                in_t,
                QUERY_RANK,
                QUERY_GATE,
                1,
            )
            _store_parts(
                key_parts_ptr + head * KEY_ROWS * row_stride,
                x_TS,
                dy_TS,
                key_latents,
                key_dlatents,
                s,
                row_stride,
                s < row_stride,
                KEY_RANK,
                KEY_GATE,
                0,
            )
            by_query_ptr = query_weights_ptr + head * QUERY_ROWS * total_queries
            by_key_ptr = key_weights_ptr + head * KEY_ROWS * total_keys
            dx_TS = _add_mix(
                dy_TS, dy_TS, query_dlatents, by_query_ptr, t, total_queries, in_t, 0, QUERY_RANK, QUERY_GATE, 1
            )
            dx_TS = _add_mix(dx_TS, dy_TS, key_dlatents, by_key_ptr, s, total_keys, in_s, 0, KEY_RANK, KEY_GATE, 0)
            if POST:
                tl.store(delta_ptr + head * queries, tl.sum(x_TS * dx_TS, 1), mask=in_t)
                tl.store(gradient_ptr + map_at, dx_TS.to(gradient_ptr.dtype.element_ty), mask=wide_t)
                out_TS = _add_mix(
                    x_TS, x_TS, query_latents, by_query_ptr, t, total_queries, in_t, 1, QUERY_RANK, QUERY_GATE, 1
                )
                out_TS = _add_mix(out_TS, x_TS, key_latents, by_key_ptr, s, total_keys, in_s, 1, KEY_RANK, KEY_GATE, 0)
            else:
                out_TS = dx_TS
            tl.store(operand_ptr + map_at, out_TS.to(operand_ptr.dtype.element_ty), mask=wide_t)
    else:
        for head in range(HEADS):
            zero_T = tl.zeros([BLOCK_T], tl.float32)
            zero_S = tl.zeros([BLOCK_S], tl.float32)
            if POST:
                tl.store(delta_ptr + head * queries, zero_T, mask=in_t)
            for r in tl.static_range(QUERY_ROWS):
                tl.store(query_parts_ptr + (head * QUERY_ROWS + r) * queries + t, zero_T, mask=in_t)
            for r in tl.static_range(KEY_ROWS):
                tl.store(key_parts_ptr + (head * KEY_ROWS + r) * row_stride + s, zero_S)
            zero_TS = tl.zeros([BLOCK_T, BLOCK_S], operand_ptr.dtype.element_ty)
            tl.store(operand_ptr + head * head_stride, zero_TS, mask=wide_t)


@triton.jit(do_not_specialize=["queries", "tiles", "blocks", "first_row", "first_query", "total_queries"])
def finish_statistics(
    parts_ptr,
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
    """The peak of a row of logits and log(sum(exp(logit - peak))), from the parts that mix_forward has left."""
    t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    head, row = tl.program_id(1), tl.program_id(2)
    in_t = t < queries
    parts_ptr += (row.to(tl.int64) * tiles * HEADS + head) * 2 * queries + t
    tile_stride = HEADS * 2 * queries
    peak_T = tl.full([BLOCK], float("-inf"), tl.float32)
    for tile in range(tiles):
        peak_T = tl.maximum(peak_T, tl.load(parts_ptr + tile * tile_stride, mask=in_t, other=0.0))
    sum_T = tl.zeros([BLOCK], tl.float32)
    for tile in range(tiles):
        of_tile_T = tl.load(parts_ptr + tile * tile_stride, mask=in_t, other=0.0)
        sum_T += tl.exp(of_tile_T - peak_T) * tl.load(parts_ptr + tile * tile_stride + queries, mask=in_t, other=1.0)
    batch = (first_row + row // blocks).to(tl.int64)
    statistics_ptr += (batch * HEADS + head) * 2 * total_queries + first_query + row % blocks * queries + t
    tl.store(statistics_ptr, peak_T, mask=in_t)
    tl.store(statistics_ptr + total_queries, tl.log(sum_T), mask=in_t)


@triton.jit(do_not_specialize=["width", "step", "tiles", "blocks", "first_row", "first", "stride", "total"])
def add_parts(
    parts_ptr,
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
    """sums [B, lines, total] = the sum of parts [rows, tiles, lines, stride] over tiles, plus sums if ADD.

    Of each line the first ``width`` positions count. Those of a batch row's block number b are the positions first +
    b step + (0 ... width - 1) of its sums; where blocks overlap they are added up in their order. What lies before
    position 0 is left out. With more than one block, step is a multiple of BLOCK and width of step.
    """
    start = tl.program_id(0) * BLOCK
    line, row, lines = tl.program_id(1), tl.program_id(2), tl.num_programs(1)
    position = start + tl.arange(0, BLOCK)
    there = (position < (blocks - 1) * step + width) & (first + position >= 0)
    tile_stride = lines.to(tl.int64) * stride
    last_block = tl.minimum(start // step, blocks - 1)
    first_block = 0
    if start >= width:
        first_block = (start - width) // step + 1
    sums = tl.zeros([BLOCK], tl.float32)
    for block in range(first_block, last_block + 1):
        within = position - block * step
        at = parts_ptr + (row * blocks + block) * tiles * tile_stride + line * stride + within
        for tile in range(tiles):
            sums += tl.load(at + tile * tile_stride, mask=there & (within < width), other=0.0)
    sums_ptr += ((first_row + row).to(tl.int64) * lines + line) * total + first + position
    if ADD:
        sums += tl.load(sums_ptr, mask=there, other=0.0)
    tl.store(sums_ptr, sums, mask=there)
