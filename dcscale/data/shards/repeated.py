"""Data that would be used twice: shards of equal content, by the checksums in their manifests, under whatever names.

The same text in shards that were made differently, with other settings or in another order, is not found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from dcscale.data.shards.manifest import Manifest, ShardInfo
from dcscale.data.storage import Storage


class RepeatedShards(NamedTuple):
    """Shards that two roots have in common, or one root twice. As text: how many, and where one of them is."""

    first: int
    """Number of the first root."""

    second: int
    """Number of the second root; the same as ``first`` if that root has them twice."""

    shards: int
    tokens: int

    example: tuple[str, str]
    """Location of one of the shards in both roots."""

    def __str__(self) -> str:
        shards = "1 shard" if self.shards == 1 else f"{self.shards:,} shards"
        return f"{shards} of {self.tokens:,} tokens, such as {self.example[0]} and {self.example[1]}"


def find_repeated(roots: Sequence[tuple[Storage, Manifest]]) -> list[RepeatedShards]:
    """The shards that are repeated, one entry per pair of roots; each shard is compared with its first occurrence."""
    distinct = {shard.sha256 for _, manifest in roots for shard in manifest.shards}
    if len(distinct) == sum(len(manifest.shards) for _, manifest in roots):
        return []  # the usual case, quick for a million shards
    first_of_sha256: dict[str, tuple[int, ShardInfo]] = {}
    pairs: dict[tuple[int, int], list[tuple[ShardInfo, ShardInfo]]] = defaultdict(list)
    for second, (_, manifest) in enumerate(roots):
        for shard in manifest.shards:
            if shard.sha256 in first_of_sha256:
                first, same = first_of_sha256[shard.sha256]
                pairs[first, second].append((same, shard))
            else:
                first_of_sha256[shard.sha256] = second, shard
    return [
        RepeatedShards(
            first,
            second,
            len(shards),
            sum(shard.tokens for _, shard in shards),
            (roots[first][0].location(shards[0][0].name), roots[second][0].location(shards[0][1].name)),
        )
        for (first, second), shards in pairs.items()
    ]
