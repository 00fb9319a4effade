"""Triton kernels of the matrix products between maps and the rows of q, k, v and dout, which they read where these are.

They skip coarse tiles that no query sees, and of the others what the kernels that mix heads, in tiles of BLOCK_T x
BLOCK_S, do not write or read. Neither keys that the rows of a chunk share nor heads that share a key/value head are
copied. Both operands of ``tl.dot`` come from shared memory: ptxas before 13.3 can miscompile products on Hopper with an
operand in registers (triton issues 9433 and 11781).

Each program makes BLOCK_D columns of its result. Layout and names: common.py. Rows of tensors are [B, positions, heads,
D], with the D elements of a head contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dcscale.ops.compose.triton.common import (
    GEOMETRY,
    INTERPRETED,
    is_seen,
    row_of,
    seen_key_tiles,
    seen_query_tiles,
)


@triton.jit
def _dot(a, b, accumulator):
    """accumulator + a b. IEEE for float32; in the interpreter bfloat16 has to be converted."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _offsets(t, s, row_keys, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr):
    """Offsets of the queries ``t`` and keys ``s``, which broadcast, in a row of a map."""
    blocks = (t // BLOCK_Q) * (row_keys // BLOCK_S) + s // BLOCK_S
    return blocks.to(tl.int64) * (HEADS * BLOCK_Q * BLOCK_S) + (t % BLOCK_Q * BLOCK_S + s % BLOCK_S)


@triton.jit(do_not_specialize=[*GEOMETRY, "scale", "limit"])
def multiply_rows(
    a_ptr,
    b_ptr,
    map_ptr,
    a_batch_stride,
    a_stride,
    a_head_stride,
    b_batch_stride,
    b_stride,
    b_head_stride,
    scale,
    limit,
    queries,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COARSE_T: tl.constexpr,
    COARSE_S: tl.constexpr,
    TILES: tl.constexpr,
):
    """map = scale a b^T with a [B, queries, HEADS, HEAD_DIM] and b [B, keys, HEADS / GROUP, HEAD_DIM], 0 outside.

    Values beyond +-limit become that: an infinite score of a key that no query sees would make 0 times it NaN. A
    program makes TILES coarse tiles of the same queries, which it reads once if BLOCK_D holds all of HEAD_DIM.
    """
    head, row = tl.program_id(1), tl.program_id(2)
    tiles_t = row_queries // COARSE_T
    tile_t, first_tile = tl.program_id(0) % tiles_t, tl.program_id(0) // tiles_t * TILES
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    seen_first, seen_last = seen_key_tiles(tile_t, band, COARSE_T, COARSE_S)
    first_tile, last_tile = tl.maximum(first_tile, seen_first), tl.minimum(first_tile + TILES, seen_last)
    t, s, d = tl.arange(0, COARSE_T), tl.arange(0, COARSE_S), tl.arange(0, BLOCK_D)[None, :]
    query = first_query + tile_t * COARSE_T + t
    in_t = (query < queries)[:, None]
    a_ptr += batch * a_batch_stride + head.to(tl.int64) * a_head_stride + query.to(tl.int64)[:, None] * a_stride
    first_s = first_key + first_tile * COARSE_S
    b_ptr += batch * b_batch_stride + (head // GROUP).to(tl.int64) * b_head_stride
    b_ptr += first_s.to(tl.int64) * b_stride
    offset_SD = s[:, None] * b_stride + d
    map_ptr += row.to(tl.int64) * row_queries * row_keys * HEADS + head * (BLOCK_Q * BLOCK_S)
    map_ptr += _offsets((tile_t * COARSE_T).to(tl.int64), first_tile * COARSE_S, row_keys, HEADS, BLOCK_Q, BLOCK_S)
    offset_TS = _offsets(t[:, None], s[None, :], row_keys, HEADS, BLOCK_Q, BLOCK_S)
    # Written so that the compiler finds out that the keys of a tile share a mask.
    tile_T = (tile_t * (COARSE_T // BLOCK_T) + t // BLOCK_T)[:, None]
    tile_S = (s // BLOCK_S)[None, :]
    if HEAD_DIM <= BLOCK_D:
        a_TD = tl.load(a_ptr + d, mask=in_t & (d < HEAD_DIM), other=0.0)
    for tile_s in range(first_tile, last_tile):
        key = (first_s + s)[:, None]
        in_s = (key >= 0) & (key < keys)
        if HEAD_DIM <= BLOCK_D:
            b_SD = tl.load(b_ptr + offset_SD, mask=in_s & (d < HEAD_DIM), other=0.0)
            product_TS = _dot(a_TD, tl.trans(b_SD), tl.zeros([COARSE_T, COARSE_S], tl.float32))
        else:
            product_TS = tl.zeros([COARSE_T, COARSE_S], tl.float32)
            for start in range(0, HEAD_DIM, BLOCK_D):
                in_d = start + d < HEAD_DIM
                a_TD = tl.load(a_ptr + start + d, mask=in_t & in_d, other=0.0)
                b_SD = tl.load(b_ptr + start + offset_SD, mask=in_s & in_d, other=0.0)
                product_TS = _dot(a_TD, tl.trans(b_SD), product_TS)
        product_TS = tl.minimum(product_TS * scale, limit, propagate_nan=tl.PropagateNan.ALL)
        product_TS = tl.maximum(product_TS, -limit, propagate_nan=tl.PropagateNan.ALL)
        seen_TS = is_seen(tile_T, tile_s * (COARSE_S // BLOCK_S) + tile_S, band, BLOCK_T, BLOCK_S)
        tl.store(map_ptr + offset_TS, product_TS.to(map_ptr.dtype.element_ty), mask=seen_TS)
        first_s += COARSE_S
        b_ptr += COARSE_S * b_stride
        map_ptr += (COARSE_S // BLOCK_S) * (HEADS * BLOCK_Q * BLOCK_S)


@triton.jit(do_not_specialize=[*GEOMETRY, "scale"])
def multiply_map(
    map_ptr,
    b_ptr,
    out_ptr,
    b_batch_stride,
    b_stride,
    b_head_stride,
    scale,
    queries,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COARSE_T: tl.constexpr,
    COARSE_S: tl.constexpr,
):
    """out [B, queries, HEADS, HEAD_DIM], contiguous, = scale map b with b [B, keys, HEADS / GROUP, HEAD_DIM]."""
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    # The last queries see the most keys: their programs start first.
    tile_t, head, row = row_queries // COARSE_T - 1 - tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2)
    batch, first_query, first_key = row_of(row, first_batch, blocks, first_query, first_key, row_queries)
    band = keys, first_key, shift, behind, ahead, row_keys
    first_tile, last_tile = seen_key_tiles(tile_t, band, COARSE_T, COARSE_S)
    t = tile_t * COARSE_T + tl.arange(0, COARSE_T)
    d = (tl.program_id(0) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    map_ptr += row.to(tl.int64) * row_queries * row_keys * HEADS + head * (BLOCK_Q * BLOCK_S)
    s = tl.arange(0, BLOCK_S)
    offset_TS = _offsets(t[:, None], s[None, :], row_keys, HEADS, BLOCK_Q, BLOCK_S)
    offset_SD = s[:, None] * b_stride + d
    first_block, last_block = first_tile * (COARSE_S // BLOCK_S), last_tile * (COARSE_S // BLOCK_S)
    first_seen_T, last_seen_T = seen_key_tiles(t // BLOCK_T, band, BLOCK_T, BLOCK_S)
    first_key += first_block * BLOCK_S
    map_ptr += first_block.to(tl.int64) * (HEADS * BLOCK_Q * BLOCK_S)
    b_ptr += batch * b_batch_stride + (head // GROUP).to(tl.int64) * b_head_stride + first_key.to(tl.int64) * b_stride
    product_TD = tl.zeros([COARSE_T, BLOCK_D], tl.float32)
    for block in range(first_block, last_block):
        seen_T = (block >= first_seen_T) & (block < last_seen_T)
        map_TS = tl.load(map_ptr + offset_TS, mask=seen_T[:, None], other=0.0)
        key = (first_key + s)[:, None]
        b_SD = tl.load(b_ptr + offset_SD, mask=(key >= 0) & (key < keys) & (d < HEAD_DIM), other=0.0)
        product_TD = _dot(map_TS, b_SD, product_TD)
        map_ptr += HEADS * BLOCK_Q * BLOCK_S
        b_ptr += BLOCK_S * b_stride
        first_key += BLOCK_S
    query = (first_query + t)[:, None]
    out_ptr += ((batch * queries + query) * HEADS + head) * HEAD_DIM + d
    tl.store(out_ptr, (product_TD * scale).to(out_ptr.dtype.element_ty), mask=(query < queries) & (d < HEAD_DIM))


@triton.jit(do_not_specialize=[*GEOMETRY, "scale", "add_from", "add_below", "final_from", "sums_keys"])
def multiply_transposed_map(
    map_ptr,
    a_ptr,
    sums_ptr,
    out_ptr,
    a_batch_stride,
    a_stride,
    a_head_stride,
    scale,
    add_from,
    add_below,
    final_from,
    sums_keys,
    queries,
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
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    COARSE_T: tl.constexpr,
    COARSE_S: tl.constexpr,
):
    """out [B, keys, HEADS / GROUP, HEAD_DIM], contiguous, = scale map^T a with a [B, queries, HEADS, HEAD_DIM].

    The sum is over the queries of all rows that see a key and over the heads of a group. If other chunks contribute to
    a key too, the sum so far is kept in float32 in sums [batch rows of the chunk, sums_keys, HEADS / GROUP, HEAD_DIM],
    whose first key is ``key_origin``. Of the tiles of COARSE_S keys, it is added for those that start in [add_from,
    add_below), and is complete, so that out is written, for those that start at ``final_from`` or later, counted from
    ``key_origin``. With several rows of a batch row, these have COARSE_T queries.
    """
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_D - 1) // BLOCK_D
    tile, kv_head, batch_row = tl.program_id(0) // PARTS, tl.program_id(1), tl.program_id(2)
    if blocks == 1:
        first_row, last_row = 0, 1
        band = keys, first_key, shift, behind, ahead, row_keys
        first_tile, last_tile = seen_query_tiles(tile, band, row_queries, COARSE_T, COARSE_S)
    else:
        # For row i the tile is number tile - i * APART, which must be among the tiles that the row's queries see.
        APART: tl.constexpr = COARSE_T // COARSE_S
        low, high = seen_key_tiles(0, (2**30, 0, shift, behind, ahead, row_keys), COARSE_T, COARSE_S)
        first_row = tl.maximum(tile - high + APART, 0) // APART
        last_row = tl.minimum(tl.maximum(tile - low + APART, 0) // APART, blocks)
        first_tile, last_tile = 0, 1
        key = first_key + tile * COARSE_S
        if (key >= keys) | (key + COARSE_S <= 0):
            last_row = first_row
    first_block, last_block = first_tile * (COARSE_T // BLOCK_Q), last_tile * (COARSE_T // BLOCK_Q)
    batch = (first_batch + batch_row).to(tl.int64)
    t, s = tl.arange(0, BLOCK_Q), tl.arange(0, COARSE_S)
    d = (tl.program_id(0) % PARTS * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
    a_ptr += batch * a_batch_stride
    # Inside the loop only the first element moves.
    offset_TS = _offsets(t[:, None], s[None, :], row_keys, HEADS, BLOCK_Q, BLOCK_S)
    offset_TD = t[:, None] * a_stride + d
    product_SD = tl.zeros([COARSE_S, BLOCK_D], tl.float32)
    # One loop over rows, heads of the group and blocks of queries, so that loads run ahead across all of them.
    row, member, block = first_row, 0, first_block
    for _ in range((last_row - first_row) * GROUP * (last_block - first_block)):
        head = kv_head * GROUP + member
        first_s = tile * COARSE_S - row * row_queries
        map_block = (batch_row * blocks + row).to(tl.int64) * (row_queries // BLOCK_Q) + block
        map_block = map_block * (row_keys // BLOCK_S) + first_s // BLOCK_S
        # Written so that the compiler finds out that the keys of a tile share a mask.
        tile_T = (block * (BLOCK_Q // BLOCK_T) + t // BLOCK_T)[:, None]
        tile_S = (first_s // BLOCK_S + s // BLOCK_S)[None, :]
        band = keys, first_key + row * row_queries, shift, behind, ahead, row_keys
        seen_TS = is_seen(tile_T, tile_S, band, BLOCK_T, BLOCK_S)
        map_ptrs = map_ptr + (map_block * HEADS + head) * (BLOCK_Q * BLOCK_S) + offset_TS
        map_TS = tl.load(map_ptrs, mask=seen_TS, other=0.0)
        query = first_query + row * row_queries + block * BLOCK_Q
        row_ptr = a_ptr + head.to(tl.int64) * a_head_stride + query.to(tl.int64) * a_stride
        a_TD = tl.load(row_ptr + offset_TD, mask=(query + t[:, None] < queries) & (d < HEAD_DIM), other=0.0)
        product_SD = _dot(tl.trans(map_TS), a_TD, product_SD)
        block += 1
        member += tl.where(block == last_block, 1, 0)
        block = tl.where(block == last_block, first_block, block)
        row += tl.where(member == GROUP, 1, 0)
        member = tl.where(member == GROUP, 0, member)
    product_SD *= scale
    KV_HEADS: tl.constexpr = HEADS // GROUP
    position = first_key - key_origin + tile * COARSE_S
    sums_ptr += ((batch_row.to(tl.int64) * sums_keys + position + s[:, None]) * KV_HEADS + kv_head) * HEAD_DIM + d
    if (position >= add_from) & (position < add_below):
        product_SD += tl.load(sums_ptr, mask=d < HEAD_DIM, other=0.0)
    if position >= final_from:
        key = (first_key + tile * COARSE_S + s)[:, None]
        offset = ((batch * keys + key) * KV_HEADS + kv_head) * HEAD_DIM + d
        in_out = (key >= 0) & (key < keys) & (d < HEAD_DIM)
        tl.store(out_ptr + offset, product_SD.to(out_ptr.dtype.element_ty), mask=in_out)
    else:
        tl.store(sums_ptr, product_SD, mask=d < HEAD_DIM)
