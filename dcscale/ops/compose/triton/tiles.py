"""Tile shapes of the kernels by architecture. Imports no triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, powers of two, and the warps that work on it, each thread on an element at least.

    Threads that shared an element could read it after another has overwritten it: kernels work in place.
    """

    queries: int
    keys: int
    warps: int


class Tiles(NamedTuple):
    """Tiles of the two kernels."""

    forward: Tile
    backward: Tile


TABLE = {
    80: {2: Tiles(Tile(32, 64, 8), Tile(32, 64, 16)), 4: Tiles(Tile(32, 64, 8), Tile(32, 32, 8))},
    90: {2: Tiles(Tile(32, 64, 8), Tile(32, 64, 16)), 4: Tiles(Tile(32, 64, 8), Tile(32, 32, 8))},
    100: {2: Tiles(Tile(32, 64, 8), Tile(32, 64, 16)), 4: Tiles(Tile(32, 64, 8), Tile(32, 32, 8))},
}
"""By compute capability (major and minor digit) and the highest rank that they are for: nothing spills then.

Chosen by what the compiler says of registers; not yet timed on a GPU, which ``triton_tune`` does."""

MAX_RANK = 4
"""The latents of a higher rank would not fit into registers."""


def tiles_for(capability: int, rank: int) -> Tiles:
    """Those of the newest architecture in the table that is not newer than this one."""
    known = [key for key in TABLE if key <= capability]
    if not known:
        raise ValueError(
            f"the GPU has compute capability {capability}, expected at least {min(TABLE)}; use backend 'chunked'"
        )
    by_rank = TABLE[max(known)]
    return by_rank[min(key for key in by_rank if key >= rank)]
