"""Skipped shards: what replaces a shard that cannot be used, and the limit on how many tokens may be skipped."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import Manifest, ShardInfo


@dataclass(frozen=True)
class SkippedShard:
    """A shard that cannot be used and is therefore skipped."""

    sha256: str
    """Its checksum in the manifest. A shard with this checksum is not tried again, under any name or path."""

    name: str
    """Its path or address."""

    tokens: int
    """Number of its tokens according to the manifest; they are missing from every epoch."""

    reason: str
    """What is wrong with it: the shard, the sample if known, and the rule it breaks."""


def placeholder(info: ShardInfo, row_tokens: int | None, dtype: str, fill: int) -> list[np.ndarray]:
    """Make documents that replace a skipped shard, with the same number of tokens and of documents (or rows).

    Equal counts keep the other documents of the shuffle block in the same order. Their exact positions change, unless
    the shard is made of rows, because the manifest does not record the lengths of the skipped documents.

    Args:
        info: the shard's entry in the manifest.
        row_tokens: tokens of a row, if the shards are made of rows.
        dtype: type of the tokens, from the manifest.
        fill: the token that fills the documents; clamped to ``dtype``.

    Returns:
        Arrays [tokens of the document], one for each document or row.
    """
    # Third-party uint16 shards may come with a tokenizer whose end-of-document id does not fit into uint16.
    fill = min(fill, int(np.iinfo(dtype).max))
    if row_tokens is not None:
        return [np.full(row_tokens, fill, dtype)] * (info.tokens // row_tokens)
    # Lengths as equal as possible: the first `longer` documents have one token more.
    length, longer = divmod(info.tokens, info.documents)
    lengths = [length + (number < longer) for number in range(info.documents)]
    return np.split(np.full(info.tokens, fill, dtype), np.cumsum(lengths)[:-1])


def check_skipped_tokens(root: str, manifest: Manifest, skipped: Collection[str], max_skipped: float) -> None:
    """Check that the skipped shards hold at most the fraction ``max_skipped`` of all tokens.

    Args:
        root: root of the shards, for the message.
        manifest: the manifest of the shards.
        skipped: SHA-256 checksums of the skipped shards.
        max_skipped: largest allowed fraction, from 0 to 1.

    Raises:
        DataError: they hold more.
    """
    lost = [info for info in manifest.shards if info.sha256 in skipped]
    tokens, total = sum(info.tokens for info in lost), manifest.totals["tokens"]
    if tokens > max_skipped * total:
        names = ", ".join(info.name for info in lost[:3]) + (", ..." if len(lost) > 3 else "")
        raise DataError(
            f"{root}: {len(lost)} of {len(manifest.shards)} shards cannot be used ({names}), {tokens:,} tokens or "
            f"{tokens / total:.3%} of all, but data.max_skipped is {max_skipped:.3%}; repair these shards, or raise "
            f"data.max_skipped"
        )
