"""Sizes: tiles of the kernels by GPU architecture, chunks of a call and the scratch they need. Does not import triton.

Letters as in staging.py: a chunk has n rows of C queries against V keys.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, powers of two, and the warps that process it, with at least one element per thread.

    If threads shared an element, one could read it after another has overwritten it, because kernels work in place.
    """

    queries: int
    keys: int
    warps: int


class Tiles(NamedTuple):
    """Tiles of the two compose kernels."""

    forward: Tile
    backward: Tile


TABLE = {
    80: {2: Tiles(Tile(32, 64, 8), Tile(32, 64, 16)), 4: Tiles(Tile(32, 64, 8), Tile(32, 32, 8))},
    90: {2: Tiles(Tile(32, 64, 8), Tile(32, 64, 16)), 4: Tiles(Tile(32, 64, 8), Tile(32, 32, 8))},
    100: {2: Tiles(Tile(32, 64, 8), Tile(32, 64, 16)), 4: Tiles(Tile(32, 64, 8), Tile(32, 32, 8))},
}
"""Tiles by compute capability (10 * major + minor) and highest rank, so that no registers are spilled.

They were chosen by the compiler's register counts; ``dcscale.ops.compose.triton.tune`` times the alternatives."""

MAX_RANK = 4
"""The latents of a higher rank do not fit into registers."""


def tiles_for(capability: int, rank: int) -> Tiles:
    """Look up the tiles for a compute capability, or else for the newest older one in the table.

    Raises:
        ValueError: the GPU is older than all in the table.
    """
    known = [key for key in TABLE if key <= capability]
    if not known:
        raise ValueError(
            f"the GPU has compute capability {capability}, expected at least {min(TABLE)}; use backend 'chunked'"
        )
    by_rank = TABLE[max(known)]
    return by_rank[min(key for key in by_rank if key >= rank)]


class Chunk(NamedTuple):
    """Batch rows, their queries, and the keys of the first block of these, which may start before position 0."""

    batch: slice
    queries: slice
    keys: slice
    blocks: int = 1
    """Number of equal parts that the queries are cut into, each of them a row."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n, C and V."""
        batch, queries, keys = (part.stop - part.start for part in (self.batch, self.queries, self.keys))
        return batch * self.blocks, queries // self.blocks, keys


def scratch_bytes(
    chunk: Chunk,
    heads: int,
    kv_heads: int,
    head_dim: int,
    item: int,
    tile: Tile,
    gradient_rows: tuple[int, int] | None = None,
) -> int:
    """Scratch memory of a chunk.

    Chunks are made as large as ``Call.scratch_bytes`` allows, but not smaller than one tile's queries of one batch row.
    Besides scratch there are copies of k, v and the weights with heads first and, in backward, float32 gradients of
    those: sizes that grow with T, not with T x S.

    Args:
        chunk: its sizes count.
        heads: query heads H.
        kv_heads: key/value heads G.
        head_dim: D.
        item: bytes of an input element.
        tile: of the direction's kernels.
        gradient_rows: of a head's packed weights, by query and by key, for backward; None for forward.
    """
    rows, queries, keys = chunk.sizes
    padded = round_up(keys, tile.keys)
    lines = rows * heads * queries
    tiles_along_keys, tiles_along_queries = padded // tile.keys, math.ceil(queries / tile.queries)
    # q, out, their gradients, and one for a copy; k and v are copied only where there are blocks.
    slices = 5 * item * lines * head_dim
    copied = rows * kv_heads * keys * head_dim if chunk.blocks > 1 else 0
    if gradient_rows is None:
        # float32 scores and composed probabilities; two float32 statistics per line and tile.
        return lines * padded * (4 + item) + 8 * lines * tiles_along_keys + slices + 2 * item * copied
    by_query, by_key = gradient_rows
    # float32 delta and weight gradients, per tile; delta once more over all tiles.
    partials_by_query = lines * (tiles_along_keys * (1 + by_query) + 1)
    partials_by_key = rows * heads * tiles_along_queries * padded * by_key
    partials = 4 * (partials_by_query + partials_by_key)
    # float32 scores, and probabilities, their gradient and the operand; with blocks, a float32 product to be added to
    # the gradients of k and v.
    return lines * padded * (4 + 3 * item) + partials + slices + (2 * item + 4) * copied


def round_up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return math.ceil(number / step) * step
