"""From shards to windows, and what stands in for a shard that is given up."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import Manifest, ShardInfo
from dcscale.data.shards.shard import read_shard
from dcscale.data.shards.skipped import SkippedShard, check_loss, placeholder
from dcscale.data.shards.text import open_text
from dcscale.data.storage import Storage
from dcscale.data.stream.block_reader import Key
from dcscale.data.stream.order import Order
from dcscale.data.stream.sequences import Window, fills_rows, pack_block, pack_rows


class Part(NamedTuple):
    """What was read of a shard."""

    documents: list[np.ndarray]
    lost: bool = False
    skipped: tuple[SkippedShard, ...] = ()


class BlockBuilder:
    """Reads a source's shards and packs them into windows; any thread may call it.

    Args:
        source: where the shards lie.
        manifest: what they hold.
        order: where their sequences lie.
        vocab_size: every token must be below it.
        verify: check every shard's SHA-256.
        on_error: ``fail``, or ``skip`` to give up a shard that cannot be used.
        max_skipped: largest part of the tokens that may be lost so.
        skipped: checksums of shards that were given up before.

    Raises:
        DataError: more is given up than may be, or the tokenizer of shards of text cannot be used.
    """

    def __init__(
        self,
        source: Storage,
        manifest: Manifest,
        order: Order,
        *,
        vocab_size: int,
        verify: bool,
        on_error: str,
        max_skipped: float,
        skipped: Collection[str],
    ) -> None:
        self.on_error = on_error
        self.shards_read = 0
        """Shards read so far, repetitions included."""
        self.skipped: frozenset[str] = frozenset()
        """Checksums of the shards that were given up."""
        self._source, self._manifest, self._order = source, manifest, order
        self._vocab_size, self._verify, self._max_skipped = vocab_size, verify, max_skipped
        self._text = open_text(source, manifest)
        self._given_up: set[str] = set()
        self._lock = threading.Lock()
        self.skip(skipped)

    def skip(self, sha256: Collection[str]) -> None:
        """Give up the shards with these checksums too.

        Raises:
            DataError: more would be lost than may be.
        """
        skipped = self.skipped.union(sha256)
        check_loss(str(self._source), self._manifest, skipped, self._max_skipped)
        self.skipped = skipped
        self._given_up.clear()

    def shards(self, key: Key) -> list[int]:
        """Shards of a window."""
        return self._order.shards(*key)

    def read(self, shard: int, needed: bool) -> Part:
        """A shard's documents; where it is given up, what stands in for them. Only what is needed now is given up.

        Raises:
            DataError: it cannot be used, and may not be given up.
        """
        info = self._manifest.shards[shard]
        if info.sha256 in self.skipped:
            return Part(self._stand_in(info), lost=True)
        try:
            return Part(self._read_shard(info))
        except DataError as error:
            if self.on_error == "fail" or not needed:
                raise
            with self._lock:
                self._given_up.add(info.sha256)
                check_loss(str(self._source), self._manifest, self.skipped | self._given_up, self._max_skipped)
            skipped = SkippedShard(info.sha256, self._source.where(info.name), info.tokens, str(error))
            return Part(self._stand_in(info), lost=True, skipped=(skipped,))

    def pack(self, key: Key, parts: list[Part]) -> Window:
        """A window of what was read of its shards."""
        window = self._pack_documents(key, [document for part in parts for document in part.documents])
        if not any(part.lost for part in parts):
            return window
        lost = [np.full(len(document), part.lost) for part in parts for document in part.documents]
        return replace(
            window,
            lost=self._pack_documents(key, lost).tokens,
            skipped=tuple(shard for part in parts for shard in part.skipped),
        )

    def _stand_in(self, info: ShardInfo) -> list[np.ndarray]:
        manifest = self._manifest
        return placeholder(info, manifest.row_tokens, manifest.dtype, manifest.tokenizer.eos_id)

    def _read_shard(self, info: ShardInfo) -> list[np.ndarray]:
        row_tokens = self._manifest.row_tokens
        documents = read_shard(
            self._source,
            info,
            dtype=self._manifest.dtype,
            vocab_size=self._vocab_size,
            verify=self._verify,
            text=self._text,
        )
        with self._lock:
            self.shards_read += 1
        if row_tokens is not None and not fills_rows(documents, row_tokens):
            raise DataError(
                f"{self._source.where(info.name)}: a document lies across the end of a row, but the manifest says "
                f"that the shards are rows of {row_tokens} tokens; make the shards again with tools/make_shards.py"
            )
        return documents

    def _pack_documents(self, key: Key, documents: list[np.ndarray]) -> Window:
        row_tokens = self._manifest.row_tokens
        if row_tokens is None:
            return pack_block(documents, self._order.documents(*key, len(documents)))
        rows = sum(map(len, documents)) // row_tokens
        return pack_rows(documents, self._order.documents(*key, rows), row_tokens)
