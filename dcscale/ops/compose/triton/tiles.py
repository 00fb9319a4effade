"""Sizes: tiles of the kernels by GPU architecture, the chunks of a call, the scratch they need, and launches as values.

Does not import triton.

Letters as in common.py: a row of a chunk is C queries against V keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

UNLIMITED = 2**30
"""Instead of a number of positions that a query sees."""


class Tile(NamedTuple):
    """Queries and keys of a tile, powers of two, and the warps that process it, with at least one element per thread.

    If threads shared an element, one could read it after another has overwritten it, because kernels work in place.
    """

    queries: int
    keys: int
    warps: int


class Tiles(NamedTuple):
    """Tiles of the kernels. All that mix heads have the same number of keys, which is that of a block of a map, and
    the queries of a block are a multiple of theirs. A product's queries are a multiple of its keys, and both of a
    block's."""

    forward: Tile
    backward: Tile
    product: Tile = Tile(128, 64, 8)
    """Of the matrix products, made of blocks."""
    columns: int = 128
    """The most columns of a head that a program works on at a time."""
    score_stages: int = 3
    """Tiles of keys that a program that makes scores holds: one that computes on, and others that are being loaded."""
    block_queries: int = 64
    """Queries of a block of a map."""

    @property
    def block(self) -> tuple[int, int]:
        """Queries and keys of a block of a map."""
        return self.block_queries, self.forward.keys


# A warp to itself: in a program of several, sums over a tile and what they are stored as need barriers.
_TILES = Tiles(Tile(32, 64, 4), Tile(8, 64, 1))
_MANY_RANKS = Tiles(Tile(32, 64, 8), Tile(8, 64, 2))
_FLOAT32 = _MANY_RANKS._replace(product=Tile(64, 64, 8), columns=32)
_BLACKWELL = Tile(128, 128, 4)
TABLE = {
    80: {2: _TILES, 4: _MANY_RANKS, "float32": _FLOAT32},
    90: {2: _TILES, 4: _MANY_RANKS, "float32": _FLOAT32},
    100: {2: _TILES._replace(product=_BLACKWELL), 4: _MANY_RANKS._replace(product=_BLACKWELL), "float32": _FLOAT32},
}
TABLE[120] = TABLE[80]
"""Tiles by compute capability (10 * major + minor) and highest rank, or for float32, so that no registers are spilled.

Those of 90 and rank 2 are, with the stages of common.py, the fastest or within 3 % of it among 847 variants on an H100
(tools/results/kernels-nvidia-h100-80gb-hbm3.json); the others follow them as far as registers allow.
``dcscale.ops.compose.triton.tune`` times the alternatives."""

MAX_RANK = 4
"""The latents of a higher rank do not fit into registers."""


def tiles_for(capability: int, rank: int, element_size: int = 2) -> Tiles:
    """Look up the tiles for a compute capability, or else for the newest older one in the table.

    Args:
        capability: 10 * major + minor.
        rank: the highest of all weights.
        element_size: bytes of an input element.

    Raises:
        ValueError: the GPU is older than all in the table.
    """
    known = [key for key in TABLE if key <= capability]
    if not known:
        raise ValueError(
            f"the GPU has compute capability {capability}, expected at least {min(TABLE)}; use backend 'chunked'"
        )
    return TABLE[max(known)][column(rank, element_size)]


def column(rank: int, element_size: int = 2) -> int | str:
    """The key of :data:`TABLE`'s entries for a highest rank and for bytes of an input element."""
    return "float32" if element_size == 4 else 2 if rank <= 2 else 4


def log_sums_shape(batch: int, queries: int, heads: int, tiles: Tiles) -> tuple[int, int, int, int]:
    """[B, blocks, H, queries of a block] of what forward saves for backward. Of the tiles in the table, those for an
    input's element size agree on it."""
    block, _ = tiles.block
    return batch, round_up(queries, tiles.product.queries) // block, heads, block


class Chunk(NamedTuple):
    """Rows whose scores are in memory at the same time: ``blocks`` of each of ``batch_rows`` batch rows."""

    first_batch: int
    batch_rows: int
    first_query: int
    """Of the first row; a multiple of a product's queries."""
    blocks: int
    """Rows of a batch row; each starts ``row_queries`` queries, and as many keys, after the one before."""
    row_queries: int
    first_key: int
    """Of the first row; may be negative."""
    row_keys: int

    @property
    def rows(self) -> int:
        """Rows of all batch rows."""
        return self.batch_rows * self.blocks

    @property
    def scores(self) -> int:
        """Staged scores of one head."""
        return self.rows * self.row_queries * self.row_keys

    @property
    def keys(self) -> int:
        """Length of the range of keys of a batch row."""
        return (self.blocks - 1) * self.row_queries + self.row_keys


class Shape(NamedTuple):
    """What decides how a call is cut into chunks."""

    batch: int
    queries: int
    keys: int
    query_offset: int
    behind: int | None
    """A query at position p sees the keys p - behind ... p + ahead; None for no limit."""
    ahead: int | None

    def chunks(self, product: Tile, fits: Callable[[Chunk], bool]) -> list[Chunk]:
        """Cut the call into chunks that fit into scratch memory, but never below one product's tile of queries.

        A windowed call is cut into rows of one product's tile of queries, with the keys that these see; as many as fit
        become a chunk. Otherwise a row has all keys up to the last that it sees, and as many queries as fit.

        The last chunk of a batch row comes first: it sees the most keys, so the memory that it frees is large enough
        for the rest.
        """
        row = self._window_row(product)
        queries = round_up(self.queries, product.queries)
        first_row = self._row_at(0, queries, product) if row is None else row

        def chunk_of(batch: int, batch_rows: int, first: int, count: int) -> Chunk:
            """The chunk of ``count`` tiles of queries, or what is left."""
            batch_rows, count = min(batch_rows, self.batch - batch), min(count, (queries - first) // product.queries)
            if row is None:
                size = count * product.queries
                return Chunk(batch, batch_rows, first, 1, size, *self._row_at(first, size, product))
            first_key, row_keys = first_row
            return Chunk(batch, batch_rows, first, count, product.queries, first_key + first, row_keys)

        tiles = queries // product.queries
        batch_rows, count = self.batch, tiles

        def largest() -> Chunk:
            return chunk_of(0, batch_rows, (tiles - count) * product.queries, count)

        # Reduce the batch rows first, then the queries.
        while batch_rows > 1 and not fits(largest()):
            batch_rows = (batch_rows + 1) // 2
        while count > 1 and not fits(largest()):
            # The last chunk sees the most keys, so all of this size fit.
            count -= 1 if count < 16 else count // 16
        cuts = [(max(0, last - count), last) for last in range(tiles, 0, -count)]
        return [
            chunk_of(batch, batch_rows, first * product.queries, last - first)
            for batch in range(0, self.batch, batch_rows)
            for first, last in cuts
        ]

    def _window_row(self, product: Tile) -> tuple[int, int] | None:
        """First key of query 0, and V, of a row of one product's tile; None if a row may as well have all keys."""
        if self.behind is None or self.ahead is None:
            return None
        before, after = round_up(self.behind, product.keys), round_up(self.ahead, product.keys)
        keys = before + product.queries + after
        return None if keys >= round_up(self.keys, product.keys) else (self.query_offset - before, keys)

    def _row_at(self, first: int, queries: int, product: Tile) -> tuple[int, int]:
        """The first key and V of a row of queries from ``first`` on, without a window."""
        last = self.keys if self.ahead is None else self.query_offset + first + queries + self.ahead
        return 0, round_up(min(last, self.keys), product.keys)

    def complete_from(self, chunk: Chunk, origin: int, step: int) -> int:
        """The first key, counted from ``origin`` and rounded up to a multiple of ``step``, that no query before the
        chunk sees: when the chunks of later queries and this one are done, sums over queries are complete from there.
        """
        if chunk.first_query == 0:
            return 0
        if self.ahead is None:
            return UNLIMITED
        return round_up(self.query_offset + chunk.first_query + self.ahead - origin, step)

    def tile_counts(self, chunk: Chunk, tile: Tile) -> TileCounts:
        """The tiles of a chunk by what their queries see of their keys, apart from documents."""
        counts = dict.fromkeys(TileCounts._fields, 0)
        for position, key, exists in self._tiles(chunk, tile):
            nearest, farthest = position - key - (tile.keys - 1), position + tile.queries - 1 - key
            behind = UNLIMITED if self.behind is None else self.behind
            ahead = UNLIMITED if self.ahead is None else self.ahead
            if not exists or nearest > behind or -farthest > ahead:
                counts["unseen"] += chunk.batch_rows
            elif farthest > behind or -nearest > ahead or key < 0 or key + tile.keys > self.keys:
                counts["edge"] += chunk.batch_rows
            else:
                counts["interior"] += chunk.batch_rows
        return TileCounts(**counts)

    def _tiles(self, chunk: Chunk, tile: Tile) -> Iterator[tuple[int, int, bool]]:
        """Position of the first query and of the first key of a batch row's tiles, and whether a tile has any key."""
        for block in range(chunk.blocks):
            first = block * chunk.row_queries
            for t in range(first, first + chunk.row_queries, tile.queries):
                for s in range(first, first + chunk.row_keys, tile.keys):
                    key = chunk.first_key + s
                    yield self.query_offset + chunk.first_query + t, key, -tile.keys < key < self.keys


class TileCounts(NamedTuple):
    """Tiles of a launch: all queries see all keys, some do, none does."""

    interior: int
    edge: int
    unseen: int


class ScratchSizes(NamedTuple):
    """What the scratch of a score depends on besides the chunk."""

    heads: int
    element_size: int
    """Bytes of an input element, and of a staged score."""
    query_ranks: tuple[int, int]
    """Of pre and post."""
    key_ranks: tuple[int, int]

    def forward(self, chunk: Chunk, tiles: Tiles) -> int:
        """Bytes of a chunk: scores, overwritten by logits and composed probabilities, and partial log-sums."""
        scores = self.heads * chunk.scores
        return scores * self.element_size + 8 * scores // tiles.forward.keys

    def backward(self, chunk: Chunk, tiles: Tiles) -> int:
        """Bytes of a chunk: scores, probabilities, their gradient, composed, latents, and partial gradients."""
        scores = self.heads * chunk.scores
        by_query, by_key = 2 * max(self.query_ranks) + 2, 2 * max(self.key_ranks) + 1
        partials = 4 * scores * by_query // tiles.backward.keys + 4 * scores * by_key // tiles.backward.queries
        return 4 * scores * self.element_size + self._latents(chunk) + partials

    def kept(self, chunk: Chunk) -> int:
        """Bytes that a chunk's forward pass may keep for backward: scores, probabilities and latents."""
        return 2 * self.heads * chunk.scores * self.element_size + self._latents(chunk)

    def _latents(self, chunk: Chunk) -> int:
        return 4 * (self.query_ranks[0] + self.key_ranks[0]) * chunk.scores


class Launch(NamedTuple):
    """A launch of a kernel, complete but for the machine."""

    name: str
    kernel: Any
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int = 1
    chunk: Chunk | None = None
    """That it works on; None for weights of the whole call."""

    def run(self) -> None:
        """Launch it on the current device."""
        self.kernel[self.grid](
            **self.arguments,
            **self.constants,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,  # not the default in newer versions of Triton, and the kernels are mostly FMAs
        )


Launcher = Callable[[Launch], None]
"""What to do with a launch: make it, record it, count it or time it."""


def round_up(number: int, step: int) -> int:
    """The next multiple of ``step``."""
    return -(-number // step) * step
