"""Triton kernels of the backward pass: the gradients of both composes of a chunk, tile by tile, and of their weights.

As in forward.py, a program goes over the heads of its tile first to sum the latents, now also those of the gradients,
and then to compose each head; then it also reduces it to the tile's partial sums of the gradients of the weights. Maps
hold zero probabilities where a query does not see a key, so no mask is needed. Layout and names: common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcscale.ops.compose.triton.common import (
    BY_KEY,
    BY_QUERY,
    GEOMETRY,
    INTERPRETED,
    MIX_STAGES,
    SUM_STAGES,
    W1,
    W2,
    add_latents,
    add_low_rank,
    gate,
    is_seen,
    map_offsets,
    query_weights,
    row_of,
    zeros,
)


@triton.jit
def _add2(a, b, c, d):
    return a + c, b + d


@triton.jit
def _add3(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def _add4(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _add5(a, b, c, d, e, f, g, h, i, j):
    return a + f, b + g, c + h, d + i, e + j


@triton.jit
def _add6(a, b, c, d, e, f, g, h, i, j, k, m):
    return a + g, b + h, c + i, d + j, e + k, f + m


@triton.jit
def _store_sums(sums_ptr, terms, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """Sum each of the terms along the axis that weights of AXIS broadcast along, and store them BLOCK apart.

    Up to six at a time are reduced together, which synchronizes the warps once instead of once for each.
    """
    COUNT: tl.constexpr = len(terms)
    if INTERPRETED:
        for i in tl.static_range(COUNT):
            tl.store(sums_ptr + i * BLOCK, tl.sum(terms[i], AXIS))
    elif COUNT > 6:
        _store_sums(sums_ptr, terms[:5], BLOCK, AXIS)
        _store_sums(sums_ptr + 5 * BLOCK, terms[5:], BLOCK, AXIS)
    else:
        if COUNT == 1:
            sums = (tl.sum(terms[0], AXIS),)
        elif COUNT == 2:
            sums = tl.reduce(terms, AXIS, _add2)
        elif COUNT == 3:
            sums = tl.reduce(terms, AXIS, _add3)
        elif COUNT == 4:
            sums = tl.reduce(terms, AXIS, _add4)
        elif COUNT == 5:
            sums = tl.reduce(terms, AXIS, _add5)
        else:
            sums = tl.reduce(terms, AXIS, _add6)
        for i in tl.static_range(COUNT):
            tl.store(sums_ptr + i * BLOCK, sums[i])


@triton.jit
def _gradient_terms(x_TS, dy_TS, latents, dlatents, RANK: tl.constexpr):
    """The terms whose sums are the gradients of a head's weights: dw1 = sum x dlatent, dw2 = sum dy latent."""
    terms = ()
    for r in tl.static_range(RANK):
        terms = terms + (x_TS * dlatents[r],)  # noqa: RUF005
    for r in tl.static_range(RANK):
        terms = terms + (dy_TS * latents[r],)  # noqa: RUF005
    return terms


@triton.jit(do_not_specialize=GEOMETRY)
def compose_probabilities_backward(
    probabilities_ptr,
    gradient_ptr,
    composed_ptr,
    query_partials_ptr,
    key_partials_ptr,
    query_weights_ptr,
    key_weights_ptr,
    keys,
    first_batch,
    blocks,
    first_query,
    first_key,
    key_origin,
    shift,
    behind,
    ahead,
    row_queries,
    row_keys,
    query_blocks,
    key_blocks,
    HEADS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Backward pass of composed = compose(probabilities).

    Reads probabilities, and the gradient of composed from ``gradient``, where it leaves that of the probabilities.
    Writes composed again, for the product with dout. partials: 2 R + 2 sums along keys, the gradients of the weights by
    query and the sum of probabilities times their gradient, which the softmax needs; sums along queries, the gradients
    of the weights by key.
    """
    tile_s, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    if not is_seen(tile_t, tile_s, band, BLOCK_T, BLOCK_S):
        return
    BLOCK: tl.constexpr = BLOCK_Q * BLOCK_S
    offset_TS = map_offsets(row, tile_t, tile_s, (row_queries, row_keys), HEADS, BLOCK_Q, BLOCK_T, BLOCK_S)
    probabilities_ptr += offset_TS
    gradient_ptr += offset_TS
    composed_ptr += offset_TS
    QUERY_LINE: tl.constexpr = (2 * QUERY_RANK + 1) * BLOCK_Q
    KEY_LINE: tl.constexpr = (2 * KEY_RANK + KEY_GATE) * BLOCK_S
    query_block = batch * query_blocks + first_query // BLOCK_Q
    query_ptr = query_weights(query_weights_ptr, query_block, tile_t, HEADS, QUERY_RANK, BLOCK_Q, BLOCK_T)
    key_block = batch * key_blocks + (first_key - key_origin) // BLOCK_S + tile_s
    key_ptr = key_weights_ptr + key_block * (HEADS * KEY_LINE) + tl.arange(0, BLOCK_S)
    QUERY_SUMS: tl.constexpr = (2 * QUERY_RANK + 2) * BLOCK_T
    KEY_SUMS: tl.constexpr = (2 * KEY_RANK + KEY_GATE) * BLOCK_S
    by_query = (row.to(tl.int64) * tl.num_programs(1) + tile_t) * tl.num_programs(0) + tile_s
    by_key = (row.to(tl.int64) * tl.num_programs(0) + tile_s) * tl.num_programs(1) + tile_t
    query_partials_ptr += by_query * (HEADS * QUERY_SUMS) + tl.arange(0, BLOCK_T)
    key_partials_ptr += by_key * (HEADS * KEY_SUMS) + tl.arange(0, BLOCK_S)

    # Latents of the probabilities and, with w2 for w1, of the gradient.
    query_latents = zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
    key_latents = zeros(KEY_RANK, BLOCK_T, BLOCK_S)
    query_dlatents = zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
    key_dlatents = zeros(KEY_RANK, BLOCK_T, BLOCK_S)
    if QUERY_RANK + KEY_RANK > 0:
        for head in tl.range(HEADS, num_stages=SUM_STAGES):
            x_TS = tl.load(probabilities_ptr + head * BLOCK).to(tl.float32)
            dy_TS = tl.load(gradient_ptr + head * BLOCK).to(tl.float32)
            of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
            query_latents = add_latents(query_latents, x_TS, of_query, W1, QUERY_RANK, BLOCK_Q, BY_QUERY)
            key_latents = add_latents(key_latents, x_TS, of_key, W1, KEY_RANK, BLOCK_S, BY_KEY)
            query_dlatents = add_latents(query_dlatents, dy_TS, of_query, W2, QUERY_RANK, BLOCK_Q, BY_QUERY)
            key_dlatents = add_latents(key_dlatents, dy_TS, of_key, W2, KEY_RANK, BLOCK_S, BY_KEY)

    for i in tl.range(HEADS, num_stages=MIX_STAGES):
        head = HEADS - 1 - i
        offset = head * BLOCK
        x_TS = tl.load(probabilities_ptr + offset).to(tl.float32)
        dy_TS = tl.load(gradient_ptr + offset).to(tl.float32)
        of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
        gate_TS = gate(of_query, of_key, QUERY_RANK, KEY_RANK, KEY_GATE, BLOCK_Q, BLOCK_S)
        y_TS = add_low_rank(gate_TS * x_TS, query_latents, of_query, W2, QUERY_RANK, BLOCK_Q, BY_QUERY)
        y_TS = add_low_rank(y_TS, key_latents, of_key, W2, KEY_RANK, BLOCK_S, BY_KEY)
        tl.store(composed_ptr + offset, y_TS.to(composed_ptr.dtype.element_ty))
        # dx[h] = dy[h] (1 + gates) + sum_r w1[r, h] dlatent_r
        dx_TS = add_low_rank(gate_TS * dy_TS, query_dlatents, of_query, W1, QUERY_RANK, BLOCK_Q, BY_QUERY)
        dx_TS = add_low_rank(dx_TS, key_dlatents, of_key, W1, KEY_RANK, BLOCK_S, BY_KEY)
        # The sums are of the gradient as it is stored: the softmax's gradient is only 0 on average if delta fits it.
        dx_TS = dx_TS.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + offset, dx_TS)
        x_dy_TS = x_TS * dy_TS
        if KEY_SUMS > 0:
            terms = _gradient_terms(x_TS, dy_TS, key_latents, key_dlatents, KEY_RANK)
            if KEY_GATE:
                terms = terms + (x_dy_TS,)  # noqa: RUF005
            _store_sums(key_partials_ptr + head * KEY_SUMS, terms, BLOCK_S, BY_KEY)
        terms = _gradient_terms(x_TS, dy_TS, query_latents, query_dlatents, QUERY_RANK)
        terms = terms + (x_dy_TS, x_TS * dx_TS.to(tl.float32))  # noqa: RUF005
        _store_sums(query_partials_ptr + head * QUERY_SUMS, terms, BLOCK_T, BY_QUERY)


@triton.jit(do_not_specialize=GEOMETRY)
def compose_scores_backward(
    scores_ptr,
    probabilities_ptr,
    gradient_ptr,
    dscores_ptr,
    latents_ptr,
    query_sums_ptr,
    query_partials_ptr,
    key_partials_ptr,
    query_weights_ptr,
    key_weights_ptr,
    keys,
    first_batch,
    blocks,
    first_query,
    first_key,
    key_origin,
    shift,
    behind,
    ahead,
    row_queries,
    row_keys,
    query_blocks,
    key_blocks,
    POST_QUERY_RANK: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Backward pass of logits = compose(scores), with dlogits = probabilities (gradient - delta) of the softmax.

    Reads scores, their latents, probabilities, and the gradient of these; delta from the query sums of
    :func:`compose_probabilities_backward` [B, all tiles along queries, heads, 2 POST_QUERY_RANK + 2, BLOCK_T]. Writes
    dscores, which may be in the memory of the scores. partials: the gradients of the weights, by query and by key, for
    scores in units of log2(e).
    """
    tile_s, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    if not is_seen(tile_t, tile_s, band, BLOCK_T, BLOCK_S):
        return
    BLOCK: tl.constexpr = BLOCK_Q * BLOCK_S
    offset_TS = map_offsets(row, tile_t, tile_s, (row_queries, row_keys), HEADS, BLOCK_Q, BLOCK_T, BLOCK_S)
    scores_ptr += offset_TS
    probabilities_ptr += offset_TS
    gradient_ptr += offset_TS
    dscores_ptr += offset_TS
    QUERY_LINE: tl.constexpr = (2 * QUERY_RANK + 1) * BLOCK_Q
    KEY_LINE: tl.constexpr = (2 * KEY_RANK + KEY_GATE) * BLOCK_S
    query_block = batch * query_blocks + first_query // BLOCK_Q
    query_ptr = query_weights(query_weights_ptr, query_block, tile_t, HEADS, QUERY_RANK, BLOCK_Q, BLOCK_T)
    key_block = batch * key_blocks + (first_key - key_origin) // BLOCK_S + tile_s
    key_ptr = key_weights_ptr + key_block * (HEADS * KEY_LINE) + tl.arange(0, BLOCK_S)
    QUERY_SUMS: tl.constexpr = (2 * QUERY_RANK + 1) * BLOCK_T
    KEY_SUMS: tl.constexpr = (2 * KEY_RANK + KEY_GATE) * BLOCK_S
    by_query = row.to(tl.int64) * tl.num_programs(1) + tile_t
    by_key = (row.to(tl.int64) * tl.num_programs(0) + tile_s) * tl.num_programs(1) + tile_t
    DELTA_LINE: tl.constexpr = (2 * POST_QUERY_RANK + 2) * BLOCK_T
    sums = batch * (query_blocks * (BLOCK_Q // BLOCK_T)) + first_query // BLOCK_T + tile_t
    delta_ptr = query_sums_ptr + sums * (HEADS * DELTA_LINE) + (DELTA_LINE - BLOCK_T) + tl.arange(0, BLOCK_T)
    query_partials_ptr += (by_query * tl.num_programs(0) + tile_s) * (HEADS * QUERY_SUMS) + tl.arange(0, BLOCK_T)
    key_partials_ptr += by_key * (HEADS * KEY_SUMS) + tl.arange(0, BLOCK_S)

    query_dlatents = zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
    key_dlatents = zeros(KEY_RANK, BLOCK_T, BLOCK_S)
    query_latents, key_latents = query_dlatents, key_dlatents
    if QUERY_RANK + KEY_RANK > 0:
        for head in tl.range(HEADS, num_stages=SUM_STAGES):
            offset = head * BLOCK
            delta_T = tl.load(delta_ptr + head * DELTA_LINE)
            dy_TS = tl.load(gradient_ptr + offset).to(tl.float32) - delta_T[:, None]
            dy_TS *= tl.load(probabilities_ptr + offset).to(tl.float32)
            of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
            query_dlatents = add_latents(query_dlatents, dy_TS, of_query, W2, QUERY_RANK, BLOCK_Q, BY_QUERY)
            key_dlatents = add_latents(key_dlatents, dy_TS, of_key, W2, KEY_RANK, BLOCK_S, BY_KEY)
        LATENTS: tl.constexpr = QUERY_RANK + KEY_RANK
        latents_ptr += map_offsets(row, tile_t, tile_s, (row_queries, row_keys), LATENTS, BLOCK_Q, BLOCK_T, BLOCK_S)
        query_latents, key_latents = (), ()
        for r in tl.static_range(QUERY_RANK):
            query_latents = query_latents + (tl.load(latents_ptr + r * BLOCK),)  # noqa: RUF005
        for r in tl.static_range(KEY_RANK):
            key_latents = key_latents + (tl.load(latents_ptr + (QUERY_RANK + r) * BLOCK),)  # noqa: RUF005

    for i in tl.range(HEADS, num_stages=MIX_STAGES):
        head = HEADS - 1 - i
        offset = head * BLOCK
        delta_T = tl.load(delta_ptr + head * DELTA_LINE)
        dy_TS = tl.load(gradient_ptr + offset).to(tl.float32) - delta_T[:, None]
        dy_TS *= tl.load(probabilities_ptr + offset).to(tl.float32)
        x_TS = tl.load(scores_ptr + offset).to(tl.float32)
        of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
        dx_TS = dy_TS * gate(of_query, of_key, QUERY_RANK, KEY_RANK, KEY_GATE, BLOCK_Q, BLOCK_S)
        dx_TS = add_low_rank(dx_TS, query_dlatents, of_query, W1, QUERY_RANK, BLOCK_Q, BY_QUERY)
        dx_TS = add_low_rank(dx_TS, key_dlatents, of_key, W1, KEY_RANK, BLOCK_S, BY_KEY)
        tl.store(dscores_ptr + offset, dx_TS.to(dscores_ptr.dtype.element_ty))
        x_dy_TS = x_TS * dy_TS
        if KEY_SUMS > 0:
            terms = _gradient_terms(x_TS, dy_TS, key_latents, key_dlatents, KEY_RANK)
            if KEY_GATE:
                terms = terms + (x_dy_TS,)  # noqa: RUF005
            _store_sums(key_partials_ptr + head * KEY_SUMS, terms, BLOCK_S, BY_KEY)
        terms = _gradient_terms(x_TS, dy_TS, query_latents, query_dlatents, QUERY_RANK)
        terms = terms + (x_dy_TS,)  # noqa: RUF005
        _store_sums(query_partials_ptr + head * QUERY_SUMS, terms, BLOCK_T, BY_QUERY)
