"""From shards to shuffle blocks, with placeholders for skipped shards."""

from __future__ import annotations

import threading
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import Manifest, ShardInfo
from dcscale.data.shards.shard import read_shard
from dcscale.data.shards.skipped import SkippedShard, check_skipped_tokens, placeholder
from dcscale.data.shards.text import open_text_reader
from dcscale.data.storage import Storage
from dcscale.data.stream.order import BlockKey, Order
from dcscale.data.stream.sequences import ShuffleBlock, fills_rows, pack_block, pack_rows


class ShardDocuments(NamedTuple):
    """What was read of a shard."""

    documents: list[np.ndarray]
    is_placeholder: bool = False
    skipped: tuple[SkippedShard, ...] = ()
    """The shard, if reading it failed just now."""


class BlockBuilder:
    """Reads a source's shards and packs them into blocks. Any thread may call it.

    Args:
        storage: where the shards are.
        manifest: what they hold.
        order: order of their documents.
        vocab_size: every token must be below it.
        verify: check every shard's SHA-256.
        on_error: ``fail``, or ``skip`` to skip a shard that cannot be used.
        max_skipped: largest fraction of the tokens that may be lost to skipped shards.
        skipped: checksums of shards that were skipped before.

    Raises:
        DataError: more is skipped than allowed, or the tokenizer of text shards cannot be used.
    """

    def __init__(
        self,
        storage: Storage,
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
        """Checksums of the shards that are known to be skipped."""
        self._storage, self._manifest, self._order = storage, manifest, order
        self._vocab_size, self._verify, self._max_skipped = vocab_size, verify, max_skipped
        self._text = open_text_reader(storage, manifest)
        self._newly_skipped: set[str] = set()
        self._lock = threading.Lock()
        self.skip(skipped)

    def skip(self, sha256: Collection[str]) -> None:
        """Skip the shards with these checksums too.

        Raises:
            DataError: more would be lost than allowed.
        """
        skipped = self.skipped.union(sha256)
        check_skipped_tokens(str(self._storage), self._manifest, skipped, self._max_skipped)
        self.skipped = skipped
        # These are in ``sha256`` if they were used; if not, they may be readable again.
        self._newly_skipped.clear()

    def read(self, shard: int, needed: bool) -> ShardDocuments:
        """Read a shard's documents, or replace them by placeholders if it is skipped.

        Args:
            shard: number of the shard.
            needed: its block is needed now. A shard that fails while it is prefetched is not skipped yet: it may be
                readable later.

        Raises:
            DataError: it cannot be used, and may not be skipped.
        """
        info = self._manifest.shards[shard]
        if info.sha256 in self.skipped:
            return ShardDocuments(self._placeholder(info), is_placeholder=True)
        try:
            return ShardDocuments(self._read_shard(info))
        except DataError as error:
            if self.on_error == "fail" or not needed:
                raise
            # Several threads may skip shards at the same time: check their sum.
            with self._lock:
                self._newly_skipped.add(info.sha256)
                check_skipped_tokens(
                    str(self._storage), self._manifest, self.skipped | self._newly_skipped, self._max_skipped
                )
            skipped = SkippedShard(info.sha256, self._storage.location(info.name), info.tokens, str(error))
            return ShardDocuments(self._placeholder(info), is_placeholder=True, skipped=(skipped,))

    def build(self, block: BlockKey, contents: list[ShardDocuments]) -> ShuffleBlock:
        """Pack what was read of a block's shards."""
        built = self._pack(block, [document for content in contents for document in content.documents])
        if not any(content.is_placeholder for content in contents):
            return built
        # Pack one flag per token in the same way as the tokens, so that both get the same order.
        flags = [
            np.full(len(document), content.is_placeholder) for content in contents for document in content.documents
        ]
        return replace(
            built,
            is_placeholder=self._pack(block, flags).tokens,
            skipped=tuple(shard for content in contents for shard in content.skipped),
        )

    def _placeholder(self, info: ShardInfo) -> list[np.ndarray]:
        manifest = self._manifest
        return placeholder(info, manifest.row_tokens, manifest.dtype, manifest.tokenizer.eos_id)

    def _read_shard(self, info: ShardInfo) -> list[np.ndarray]:
        row_tokens = self._manifest.row_tokens
        documents = read_shard(
            self._storage,
            info,
            dtype=self._manifest.dtype,
            vocab_size=self._vocab_size,
            verify=self._verify,
            text=self._text,
        )
        with self._lock:
            self.shards_read += 1
        # Shards of packed rows are cut at the rows, so no document may continue in the next row.
        if row_tokens is not None and not fills_rows(documents, row_tokens):
            raise DataError(
                f"{self._storage.location(info.name)}: a document extends past the end of a row, but the manifest says "
                f"that the shards are rows of {row_tokens} tokens; make the shards again with tools/make_shards.py"
            )
        return documents

    def _pack(self, block: BlockKey, documents: list[np.ndarray]) -> ShuffleBlock:
        row_tokens = self._manifest.row_tokens
        if row_tokens is None:
            return pack_block(documents, self._order.document_order(block, len(documents)))
        rows = sum(map(len, documents)) // row_tokens
        return pack_rows(documents, self._order.document_order(block, rows), row_tokens)
