"""Triton kernels of the forward pass: compose the scores, and compose the probabilities, of a chunk tile by tile.

A program owns one tile of queries by keys and goes over the heads twice. The first time it sums the latents, the
matrices without a head axis inside the low-rank terms (2R of them, float32, in registers). The second time it composes
each head, in reverse order, so that it finds the most recently read ones in L2. Layout and names: common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcscale.ops.compose.triton.common import (
    BY_KEY,
    BY_QUERY,
    GEOMETRY,
    MIX_STAGES,
    SUM_STAGES,
    W1,
    W2,
    add_latents,
    add_low_rank,
    gate,
    has_edge,
    is_seen,
    map_offsets,
    query_offsets,
    query_weights,
    row_of,
    seen_TS,
    zeros,
)


@triton.jit(do_not_specialize=GEOMETRY)
def compose_scores(
    scores_ptr,
    out_ptr,
    latents_ptr,
    partials_ptr,
    log_sums_ptr,
    query_weights_ptr,
    key_weights_ptr,
    documents_ptr,
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
    PROBABILITIES: tl.constexpr,
    KEEP_LATENTS: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Pre: y = compose(scores), -inf where a query does not see a key, rounded to the type of out.

    Without PROBABILITIES: out = y, and partials (2 sums along keys) = the maximum of y over the tile's keys and the sum
    of exp2(y - maximum). With PROBABILITIES: out = exp2(y - log_sum). With KEEP_LATENTS, latents, a map of 2R heads, by
    query and then by key, of the scores. out may be scores.
    """
    tile_s, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    if not is_seen(tile_t, tile_s, band, BLOCK_T, BLOCK_S):
        return
    BLOCK: tl.constexpr = BLOCK_Q * BLOCK_S
    offset_TS = map_offsets(row, tile_t, tile_s, (row_queries, row_keys), HEADS, BLOCK_Q, BLOCK_T, BLOCK_S)
    scores_ptr += offset_TS
    out_ptr += offset_TS
    QUERY_LINE: tl.constexpr = (2 * QUERY_RANK + 1) * BLOCK_Q
    KEY_LINE: tl.constexpr = (2 * KEY_RANK + KEY_GATE) * BLOCK_S
    query_block = batch * query_blocks + first_query // BLOCK_Q
    query_ptr = query_weights(query_weights_ptr, query_block, tile_t, HEADS, QUERY_RANK, BLOCK_Q, BLOCK_T)
    key_block = batch * key_blocks + (first_key - key_origin) // BLOCK_S + tile_s
    key_ptr = key_weights_ptr + key_block * (HEADS * KEY_LINE) + tl.arange(0, BLOCK_S)
    log_sums_ptr += query_block * (HEADS * BLOCK_Q) + query_offsets(tile_t, HEADS * BLOCK_Q, BLOCK_Q, BLOCK_T)
    tile = (row.to(tl.int64) * tl.num_programs(1) + tile_t) * tl.num_programs(0) + tile_s
    partials_ptr += tile * (HEADS * 2 * BLOCK_T) + tl.arange(0, BLOCK_T)

    # latent_r = sum_g w1[r, g] x[g]
    query_latents = zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
    key_latents = zeros(KEY_RANK, BLOCK_T, BLOCK_S)
    if QUERY_RANK + KEY_RANK > 0:
        for head in tl.range(HEADS, num_stages=SUM_STAGES):
            x_TS = tl.load(scores_ptr + head * BLOCK).to(tl.float32)
            of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
            query_latents = add_latents(query_latents, x_TS, of_query, W1, QUERY_RANK, BLOCK_Q, BY_QUERY)
            key_latents = add_latents(key_latents, x_TS, of_key, W1, KEY_RANK, BLOCK_S, BY_KEY)
        if KEEP_LATENTS:
            LATENTS: tl.constexpr = QUERY_RANK + KEY_RANK
            latents_ptr += map_offsets(row, tile_t, tile_s, (row_queries, row_keys), LATENTS, BLOCK_Q, BLOCK_T, BLOCK_S)
            for r in tl.static_range(QUERY_RANK):
                tl.store(latents_ptr + r * BLOCK, query_latents[r])
            for r in tl.static_range(KEY_RANK):
                tl.store(latents_ptr + (QUERY_RANK + r) * BLOCK, key_latents[r])

    # The mask is needed in tiles that an edge of the visible band crosses, or of the keys, or of a document.
    edge = has_edge(tile_t, tile_s, band, BLOCK_T, BLOCK_S)
    if DOCUMENTS:
        documents_ptr += batch * keys
        mask_TS = seen_TS(tile_t, tile_s, band, documents_ptr, DOCUMENTS, BLOCK_T, BLOCK_S)
        edge = tl.min(tl.min(mask_TS.to(tl.int32), 1), 0) == 0
    # y[h] = x[h] (1 + gates) + sum_r w2[r, h] latent_r
    for i in tl.range(HEADS, num_stages=MIX_STAGES):
        head = HEADS - 1 - i
        x_TS = tl.load(scores_ptr + head * BLOCK).to(tl.float32)
        of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
        y_TS = x_TS * gate(of_query, of_key, QUERY_RANK, KEY_RANK, KEY_GATE, BLOCK_Q, BLOCK_S)
        y_TS = add_low_rank(y_TS, query_latents, of_query, W2, QUERY_RANK, BLOCK_Q, BY_QUERY)
        y_TS = add_low_rank(y_TS, key_latents, of_key, W2, KEY_RANK, BLOCK_S, BY_KEY)
        if edge:
            mask_TS = seen_TS(tile_t, tile_s, band, documents_ptr, DOCUMENTS, BLOCK_T, BLOCK_S)
            y_TS = tl.where(mask_TS, y_TS, float("-inf"))
        # All that follows is of the logits as they are stored, so that probabilities add up to 1 in both directions.
        y_TS = y_TS.to(out_ptr.dtype.element_ty).to(tl.float32)
        if PROBABILITIES:
            y_TS = tl.exp2(y_TS - tl.load(log_sums_ptr + head * BLOCK_Q)[:, None])
        else:
            # The tile's part of an online softmax. A row without a visible key has a maximum of -inf; subtract 0
            # there, because -inf - (-inf) is NaN.
            max_T = tl.max(y_TS, 1)
            finite_max_T = tl.where(max_T == float("-inf"), 0.0, max_T)
            tl.store(partials_ptr + head * 2 * BLOCK_T, max_T)
            sum_T = tl.sum(tl.exp2(y_TS - finite_max_T[:, None]), 1)
            tl.store(partials_ptr + (head * 2 + 1) * BLOCK_T, sum_T)
        tl.store(out_ptr + head * BLOCK, y_TS.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=GEOMETRY)
def compose_probabilities(
    logits_ptr,
    composed_ptr,
    probabilities_ptr,
    log_sums_ptr,
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
    KEEP_PROBABILITIES: tl.constexpr,
    HEADS: tl.constexpr,
    QUERY_RANK: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Post: composed = compose(exp2(logits - log_sum)), and with KEEP_PROBABILITIES also the probabilities themselves.

    composed may be in the memory of the logits.
    """
    tile_s, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    if not is_seen(tile_t, tile_s, band, BLOCK_T, BLOCK_S):
        return
    BLOCK: tl.constexpr = BLOCK_Q * BLOCK_S
    offset_TS = map_offsets(row, tile_t, tile_s, (row_queries, row_keys), HEADS, BLOCK_Q, BLOCK_T, BLOCK_S)
    logits_ptr += offset_TS
    composed_ptr += offset_TS
    probabilities_ptr += offset_TS
    QUERY_LINE: tl.constexpr = (2 * QUERY_RANK + 1) * BLOCK_Q
    KEY_LINE: tl.constexpr = (2 * KEY_RANK + KEY_GATE) * BLOCK_S
    query_block = batch * query_blocks + first_query // BLOCK_Q
    query_ptr = query_weights(query_weights_ptr, query_block, tile_t, HEADS, QUERY_RANK, BLOCK_Q, BLOCK_T)
    key_block = batch * key_blocks + (first_key - key_origin) // BLOCK_S + tile_s
    key_ptr = key_weights_ptr + key_block * (HEADS * KEY_LINE) + tl.arange(0, BLOCK_S)
    log_sums_ptr += query_block * (HEADS * BLOCK_Q) + query_offsets(tile_t, HEADS * BLOCK_Q, BLOCK_Q, BLOCK_T)

    query_latents = zeros(QUERY_RANK, BLOCK_T, BLOCK_S)
    key_latents = zeros(KEY_RANK, BLOCK_T, BLOCK_S)
    if QUERY_RANK + KEY_RANK > 0:
        for head in tl.range(HEADS, num_stages=SUM_STAGES):
            log_sum_T = tl.load(log_sums_ptr + head * BLOCK_Q)
            x_TS = tl.exp2(tl.load(logits_ptr + head * BLOCK).to(tl.float32) - log_sum_T[:, None])
            of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
            query_latents = add_latents(query_latents, x_TS, of_query, W1, QUERY_RANK, BLOCK_Q, BY_QUERY)
            key_latents = add_latents(key_latents, x_TS, of_key, W1, KEY_RANK, BLOCK_S, BY_KEY)

    for i in tl.range(HEADS, num_stages=MIX_STAGES):
        head = HEADS - 1 - i
        offset = head * BLOCK
        log_sum_T = tl.load(log_sums_ptr + head * BLOCK_Q)
        x_TS = tl.exp2(tl.load(logits_ptr + offset).to(tl.float32) - log_sum_T[:, None])
        if KEEP_PROBABILITIES:
            tl.store(probabilities_ptr + offset, x_TS.to(probabilities_ptr.dtype.element_ty))
        of_query, of_key = query_ptr + head * QUERY_LINE, key_ptr + head * KEY_LINE
        y_TS = x_TS * gate(of_query, of_key, QUERY_RANK, KEY_RANK, KEY_GATE, BLOCK_Q, BLOCK_S)
        y_TS = add_low_rank(y_TS, query_latents, of_query, W2, QUERY_RANK, BLOCK_Q, BY_QUERY)
        y_TS = add_low_rank(y_TS, key_latents, of_key, W2, KEY_RANK, BLOCK_S, BY_KEY)
        tl.store(composed_ptr + offset, y_TS.to(composed_ptr.dtype.element_ty))
