"""Tile shapes of the kernels by architecture. Imports no triton."""

from __future__ import annotations

from typing import NamedTuple


class Tile(NamedTuple):
    """Queries and keys of a tile, powers of two and at least 16, and the warps that work on it."""

    queries: int
    keys: int
    warps: int


class Tiles(NamedTuple):
    """Tiles of the two kernels."""

    forward: Tile
    backward: Tile


TABLE = {
    80: Tiles(Tile(32, 64, 8), Tile(16, 64, 8)),
    90: Tiles(Tile(32, 64, 8), Tile(16, 64, 8)),
    100: Tiles(Tile(32, 64, 8), Tile(16, 64, 8)),
}
"""By compute capability, major and minor digit. Chosen so that nothing spills at rank 2; not yet timed on a GPU."""


def tiles_for(capability: int) -> Tiles:
    """Those of the newest architecture in the table that is not newer than this one."""
    known = [key for key in TABLE if key <= capability]
    if not known:
        raise ValueError(
            f"the GPU has compute capability {capability}, expected at least {min(TABLE)}; use backend 'chunked'"
        )
    return TABLE[max(known)]
