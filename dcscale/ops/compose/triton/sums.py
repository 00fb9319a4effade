"""Triton kernels that add up what the tiles of a chunk have summed on their own, in a fixed order.

Layout and names: common.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcscale.ops.compose.triton.common import GEOMETRY, row_of, seen_key_tiles, seen_query_tiles


@triton.jit(do_not_specialize=GEOMETRY)
def finish_log_sums(
    partials_ptr,
    log_sums_ptr,
    keys,
    first_batch,
    blocks,
    first_query,
    first_key,
    shift,
    behind,
    ahead,
    row_queries,
    row_keys,
    query_blocks,
    HEADS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """log_sums from the maximum and the sum of each tile's logits; 0 for a query that sees no key."""
    head, tile_t, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    first, last = seen_key_tiles(tile_t, band, BLOCK_T, BLOCK_S)
    t = tl.arange(0, BLOCK_T)
    tiles = (row.to(tl.int64) * tl.num_programs(1) + tile_t) * (row_keys // BLOCK_S)
    partials_ptr += (tiles * HEADS + head) * (2 * BLOCK_T) + t
    max_T = tl.full([BLOCK_T], float("-inf"), tl.float32)
    sum_T = tl.zeros([BLOCK_T], tl.float32)
    for tile_s in range(first, last):
        tile_ptr = partials_ptr + tile_s * (HEADS * 2 * BLOCK_T)
        of_tile_T = tl.load(tile_ptr)
        new_max_T = tl.maximum(max_T, of_tile_T)
        # Subtract 0 from -inf, because -inf - (-inf) is NaN.
        finite_T = tl.where(new_max_T == float("-inf"), 0.0, new_max_T)
        sum_T = sum_T * tl.exp2(max_T - finite_T) + tl.load(tile_ptr + BLOCK_T) * tl.exp2(of_tile_T - finite_T)
        max_T = new_max_T
    sees_none_T = max_T == float("-inf")
    log_sum_T = tl.where(sees_none_T, 0.0, max_T) + tl.log2(tl.where(sees_none_T, 1.0, sum_T))
    query = first_query + tile_t * BLOCK_T + t
    log_sums_ptr += ((batch * query_blocks + query // BLOCK_Q) * HEADS + head) * BLOCK_Q + query % BLOCK_Q
    tl.store(log_sums_ptr, log_sum_T)


@triton.jit(do_not_specialize=GEOMETRY)
def sum_by_query(
    partials_ptr,
    sums_ptr,
    keys,
    first_batch,
    blocks,
    first_query,
    first_key,
    shift,
    behind,
    ahead,
    row_queries,
    row_keys,
    query_blocks,
    LINE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """sums [B, all tiles along queries, LINE] = the sums over the keys, with LINE = heads * sums * BLOCK_T."""
    tile_t, row = tl.program_id(0), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    first, last = seen_key_tiles(tile_t, band, BLOCK_T, BLOCK_S)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tiles = (row.to(tl.int64) * tl.num_programs(0) + tile_t) * (row_keys // BLOCK_S)
    partials_ptr += (tiles + first) * LINE + i
    sums = tl.zeros([BLOCK], tl.float32)
    for _ in range(first, last):
        sums += tl.load(partials_ptr, mask=i < LINE, other=0.0)
        partials_ptr += LINE
    sums_ptr += (batch * (query_blocks * (BLOCK_Q // BLOCK_T)) + first_query // BLOCK_T + tile_t) * LINE + i
    tl.store(sums_ptr, sums, mask=i < LINE)


@triton.jit(do_not_specialize=GEOMETRY)
def sum_by_key(
    partials_ptr,
    sums_ptr,
    keys,
    first_batch,
    blocks,
    first_key,
    key_origin,
    shift,
    behind,
    ahead,
    row_queries,
    row_keys,
    key_blocks,
    LINE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """sums [B, all blocks of keys, LINE] += the sums over the queries of all rows; LINE = heads * sums * BLOCK_S."""
    tile, batch_row = tl.program_id(0), tl.program_id(2)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tiles_t, tiles_s = row_queries // BLOCK_T, row_keys // BLOCK_S
    ahead_of_row = row_queries // BLOCK_S  # tiles between the first keys of two rows
    block = (first_batch + batch_row).to(tl.int64) * key_blocks + (first_key - key_origin) // BLOCK_S + tile
    sums_ptr += block * LINE + i
    sums = tl.load(sums_ptr, mask=i < LINE, other=0.0)
    first_row = 0
    if tile >= tiles_s:
        first_row = (tile - tiles_s) // ahead_of_row + 1
    for row in range(first_row, tl.minimum(tile // ahead_of_row + 1, blocks)):
        tile_s = tile - row * ahead_of_row
        band = keys, first_key + row * row_queries, shift, behind, ahead, row_keys
        first, last = seen_query_tiles(tile_s, band, row_queries, BLOCK_T, BLOCK_S)
        tiles = ((batch_row * blocks + row).to(tl.int64) * tiles_s + tile_s) * tiles_t
        tile_ptr = partials_ptr + (tiles + first) * LINE + i
        for _ in range(first, last):
            sums += tl.load(tile_ptr, mask=i < LINE, other=0.0)
            tile_ptr += LINE
    tl.store(sums_ptr, sums, mask=i < LINE)
