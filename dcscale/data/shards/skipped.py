"""Shards that cannot be used and are given up: what stands in their place, and how much may be lost."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import Manifest, ShardInfo


@dataclass(frozen=True)
class SkippedShard:
    """A shard that was given up."""

    sha256: str
    """Its checksum in the manifest: that content is not tried again, whatever it is called and wherever it lies."""

    name: str
    """Its path or address."""

    tokens: int
    """Tokens in it, by the manifest: lost in every epoch."""

    reason: str
    """What is wrong with it: the shard, the sample where it is known, the rule."""


def placeholder(info: ShardInfo, row_tokens: int | None, dtype: str, fill: int) -> list[np.ndarray]:
    """Documents of ``fill`` that take the place of a shard's: as many tokens, and as many documents or rows.

    So the documents of the other shards of its window are put into the same order as with it. Their exact places differ
    where documents are cut anywhere, since the manifest does not state how long the lost ones were; rows keep theirs.
    """
    fill = min(fill, int(np.iinfo(dtype).max))  # uint16 tokens of others may lack the end of their large vocabulary
    if row_tokens is not None:
        return [np.full(row_tokens, fill, dtype)] * (info.tokens // row_tokens)
    length, longer = divmod(info.tokens, info.documents)
    lengths = [length + (number < longer) for number in range(info.documents)]
    return np.split(np.full(info.tokens, fill, dtype), np.cumsum(lengths)[:-1])


def check_loss(where: str, manifest: Manifest, skipped: Collection[str], most: float) -> None:
    """Check that no more than a part ``most`` of the tokens is lost with the shards whose checksums are ``skipped``.

    Raises:
        DataError: more is lost.
    """
    lost = [info for info in manifest.shards if info.sha256 in skipped]
    tokens, total = sum(info.tokens for info in lost), manifest.totals["tokens"]
    if tokens > most * total:
        names = ", ".join(info.name for info in lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise DataError(
            f"{where}: {len(lost)} of {len(manifest.shards)} shards cannot be used ({names}), {tokens:,} tokens or "
            f"{tokens / total:.3%} of all, but data.max_skipped is {most:.3%}; mend these shards, or raise "
            f"data.max_skipped"
        )
