"""What the Triton kernels share: how a chunk is laid out in memory, what its queries see, and sums of weighted heads.

A *row* is C queries of a batch row against V keys; a chunk has one row of each of its batch rows or, with a window,
``blocks`` consecutive ones, each C positions after the one before, its keys too. Everything is laid out so that inside
the loops over the heads every stride is a constant and no load needs a mask:

maps      scores, probabilities and their gradients [rows, C / BLOCK_Q, V / BLOCK_S, heads, BLOCK_Q, BLOCK_S]: all
          heads of a block are contiguous. C and V are multiples of COARSE_T and COARSE_S, the tile of the products.
          Tiles of BLOCK_T x BLOCK_S of which no query sees any key are neither read nor written.
weights   by query [B, blocks, heads, 2 R + 1, BLOCK_Q], by key [B, blocks, heads, sums, BLOCK_S], float32, padded with
          zeros: R rows w1 (heads to latents), R rows w2 (latents to heads), and the gate, to which 1 is added by query.
          Absent weights have no rows, but the gate by query always has one. The first block of keys starts at
          ``key_origin``, the first key of the first chunk, which may be before position 0.
log-sums  [B, blocks, heads, BLOCK_Q]: log2 of the sum of exp2 of a query's logits, which are in units of log2(e).
partials  of sums along keys [rows, tiles along queries, tiles along keys, heads, sums, BLOCK_T], of sums along queries
          [rows, tiles along keys, tiles along queries, heads, sums, BLOCK_S]; sums.py adds them in a fixed order. No
          atomics, so two runs give the same bits.

Formulas: DCMHA, arXiv 2405.08553, section 3. Axes in names: T queries and S keys of a tile.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Triton's interpreter is slow at reductions of tuples and wrong at products of bfloat16: plain ones replace them."""

# Values of AXIS: which positions the weights belong to. It is also the axis that they broadcast along.
BY_QUERY = tl.constexpr(1)
BY_KEY = tl.constexpr(0)

# Values of FACTOR: the first factor of a low-rank term maps heads to latents, the second latents to heads.
W1 = tl.constexpr(0)
W2 = tl.constexpr(1)

# Heads whose tiles a program has on their way to it or holds, in the loop that sums latents and in the one that
# composes. A multiprocessor runs so few warps of these kernels that they would wait for memory otherwise.
SUM_STAGES = tl.constexpr(5)
MIX_STAGES = tl.constexpr(4)

GEOMETRY = [
    "queries",  # of the call
    "keys",  # of the call
    "first_batch",  # the chunk's first batch row
    "blocks",  # rows of a batch row
    "first_query",  # of a batch row's first row
    "first_key",  # of a batch row's first row; may be negative
    "key_origin",
    "shift",  # position of a row's first query minus that of its first key
    "behind",  # a query at position p sees the keys p - behind ... p + ahead
    "ahead",
    "row_queries",  # C
    "row_keys",  # V
    "query_blocks",  # of the weights
    "key_blocks",
]
"""Integers that describe a chunk. They change from chunk to chunk: specialized code would only be compiled more often.

The kernels pass those that decide what is seen as a tuple, ``band``: (keys, first_key, shift, behind, ahead, row_keys),
with the first key of the program's row."""


@triton.jit
def row_of(row, first_batch, blocks, first_query, first_key, row_queries):
    """A row's batch row (int64), first query and first key."""
    first = row % blocks * row_queries
    return (first_batch + row // blocks).to(tl.int64), first_query + first, first_key + first


@triton.jit
def seen_key_tiles(tile_t, band, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The range [first, last) of a row's tiles along keys in which some query of tile ``tile_t`` sees some key."""
    keys, first_key, shift, behind, ahead, row_keys = band
    low = tl.maximum(shift + tile_t * BLOCK_T - behind, tl.maximum(-first_key, 0))
    high = tl.minimum(shift + tile_t * BLOCK_T + BLOCK_T - 1 + ahead, tl.minimum(keys - first_key, row_keys) - 1)
    # Division truncates, so it must not see negative numbers.
    return low // BLOCK_S, tl.maximum(high + BLOCK_S, 0) // BLOCK_S


@triton.jit
def seen_query_tiles(tile_s, band, row_queries, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The range [first, last) of a row's tiles along queries in which some query sees some key of tile ``tile_s``."""
    keys, first_key, shift, behind, ahead, _ = band
    low = tl.maximum(tile_s * BLOCK_S - shift - ahead, 0)
    high = tl.minimum(tile_s * BLOCK_S + BLOCK_S - 1 - shift + behind, row_queries - 1)
    exists = (first_key + tile_s * BLOCK_S < keys) & (first_key + tile_s * BLOCK_S + BLOCK_S > 0)
    return low // BLOCK_T, tl.where(exists, tl.maximum(high + BLOCK_T, 0) // BLOCK_T, 0)


@triton.jit
def is_seen(tile_t, tile_s, band, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Whether any query of the tile sees any of its keys; of one tile or of several that broadcast."""
    first, last = seen_key_tiles(tile_t, band, BLOCK_T, BLOCK_S)
    return (tile_s >= first) & (tile_s < last)


@triton.jit
def has_edge(tile_t, tile_s, band, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Whether some query of the tile does not see some of its keys, apart from documents."""
    keys, first_key, shift, behind, ahead, _ = band
    distance, key = shift + tile_t * BLOCK_T - tile_s * BLOCK_S, first_key + tile_s * BLOCK_S
    return (distance + BLOCK_T - 1 > behind) | (BLOCK_S - 1 - distance > ahead) | (key < 0) | (key + BLOCK_S > keys)


@triton.jit
def seen_TS(tile_t, tile_s, band, documents_ptr, DOCUMENTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Which of the tile's keys its queries see."""
    keys, first_key, shift, behind, ahead, _ = band
    position_T = shift + tile_t * BLOCK_T + tl.arange(0, BLOCK_T)
    position_S = tile_s * BLOCK_S + tl.arange(0, BLOCK_S)
    distance_TS = position_T[:, None] - position_S[None, :]
    key_S = first_key + position_S
    exists_S = (key_S >= 0) & (key_S < keys)
    mask_TS = (distance_TS <= behind) & (distance_TS >= -ahead) & exists_S[None, :]
    if DOCUMENTS:
        key_T = first_key + position_T
        of_query_T = tl.load(documents_ptr + key_T, mask=(key_T >= 0) & (key_T < keys), other=0)
        of_key_S = tl.load(documents_ptr + key_S, mask=exists_S, other=0)
        mask_TS &= of_query_T[:, None] == of_key_S[None, :]
    return mask_TS


@triton.jit
def query_offsets(tile_t, LINE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr):
    """Offsets of a tile's queries in blocks of BLOCK_Q queries that are LINE elements apart."""
    TILES: tl.constexpr = BLOCK_Q // BLOCK_T  # of a block
    return tile_t // TILES * LINE + tile_t % TILES * BLOCK_T + tl.arange(0, BLOCK_T)


@triton.jit
def map_offsets(
    row, tile_t, tile_s, sizes, HEADS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Offsets of a tile's elements in a map of HEADS heads; ``sizes`` is (C, V). The next head is one block further."""
    row_queries, row_keys = sizes
    TILES: tl.constexpr = BLOCK_Q // BLOCK_T
    # int64, because a map may have more than 2^31 elements.
    block = row.to(tl.int64) * (row_queries // BLOCK_Q) + tile_t // TILES
    block = block * (row_keys // BLOCK_S) + tile_s
    t, s = tile_t % TILES * BLOCK_T + tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S)
    return block * (HEADS * BLOCK_Q * BLOCK_S) + (t[:, None] * BLOCK_S + s[None, :])


@triton.jit
def query_weights(
    ptr, block, tile_t, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr
):
    """Pointers to the first weights of the first head, for a tile's queries. ``block`` has the row's first query."""
    LINE: tl.constexpr = HEADS * (2 * RANK + 1) * BLOCK_Q
    return ptr + block * LINE + query_offsets(tile_t, LINE, BLOCK_Q, BLOCK_T)


@triton.jit
def zeros(RANK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """RANK latents of 0; one for a rank of 0, which is not used."""
    zero_TS = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    zeros = (zero_TS,)
    for _ in tl.static_range(RANK - 1):
        zeros = zeros + (zero_TS,)  # noqa: RUF005
    return zeros


@triton.jit
def _weight(weights_ptr, ROW: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """A row of a head's weights, as a column (BY_QUERY) or row (BY_KEY) that broadcasts over the tile."""
    return tl.expand_dims(tl.load(weights_ptr + ROW * BLOCK), AXIS)


@triton.jit
def add_latents(
    latents, x_TS, weights_ptr, FACTOR: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr
):
    """latents[r] + w[r] x for each r, where w is W1 or, for the latents of gradients, W2."""
    if RANK > 0:
        sums = (latents[0] + _weight(weights_ptr, FACTOR * RANK, BLOCK, AXIS) * x_TS,)
        for r in tl.static_range(1, RANK):
            sums = sums + (latents[r] + _weight(weights_ptr, FACTOR * RANK + r, BLOCK, AXIS) * x_TS,)  # noqa: RUF005
    else:
        sums = latents
    return sums


@triton.jit
def add_low_rank(
    y_TS, latents, weights_ptr, FACTOR: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr, AXIS: tl.constexpr
):
    """y + sum_r w[r] latents[r], where w is W2 or, for gradients, W1."""
    for r in tl.static_range(RANK):
        y_TS += _weight(weights_ptr, FACTOR * RANK + r, BLOCK, AXIS) * latents[r]
    return y_TS


@triton.jit
def gate(
    query_ptr,
    key_ptr,
    QUERY_RANK: tl.constexpr,
    KEY_RANK: tl.constexpr,
    KEY_GATE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """1 + qg + kg."""
    gate = _weight(query_ptr, 2 * QUERY_RANK, BLOCK_Q, BY_QUERY)
    if KEY_GATE:
        gate = gate + _weight(key_ptr, 2 * KEY_RANK, BLOCK_S, BY_KEY)
    return gate
