"""Shuffle blocks built from shards by threads, before they are needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from dcscale.data.errors import DataError
from dcscale.data.stream.order import BlockKey
from dcscale.data.stream.sequences import ShuffleBlock

_CLOSED = "reading was ended"


class BlockPrefetcher:
    """Builds the blocks that are wanted, in order, and holds them until they are no longer wanted.

    The shards of a block are read by up to ``threads`` threads at once. Where a block has fewer shards than that,
    several blocks are built at the same time. So at most max(``threads``, shards of one block) raw shards are held,
    plus those still being read for blocks that are no longer wanted. The threads end with their block. They are
    daemons, so they never keep a process from ending.

    Args:
        shards_of: returns the shards of a block.
        read: reads one shard; its second argument is true if the block is needed now, at the last attempt.
        build: builds a block from what was read of its shards.
        threads: shards read at once.
    """

    def __init__(
        self,
        shards_of: Callable[[BlockKey], list[int]],
        read: Callable[[int, bool], Any],
        build: Callable[[BlockKey, list[Any]], ShuffleBlock],
        threads: int,
    ) -> None:
        self._shards_of, self._read, self._build, self._threads = shards_of, read, build, threads
        self._lock = threading.Lock()
        self._wanted: dict[BlockKey, _PendingBlock] = {}
        self._closed = False

    def __len__(self) -> int:
        """Blocks held or still to be built."""
        return len(self._wanted)

    def want(self, keys: Iterable[BlockKey]) -> None:
        """Hold these blocks and evict all others; missing ones are built, in this order.

        Raises:
            DataError: the prefetcher is closed.
        """
        with self._lock:
            if self._closed:
                raise DataError(_CLOSED)
            self._wanted = {key: self._wanted.get(key) or _PendingBlock(key) for key in keys}
            self._start()

    def get(self, key: BlockKey) -> ShuffleBlock:
        """A wanted block; waits for it.

        Raises:
            DataError: it cannot be built, or the prefetcher was closed.
        """
        pending = self._wanted.get(key)
        if pending is None:  # closed since it was wanted
            raise DataError(_CLOSED)
        try:
            return pending.block.result()
        except DataError:
            # The cause may have been temporary, and the block was read too early to count: try once more, first of all.
            with self._lock:
                if self._wanted.get(key) is not pending:  # closed meanwhile
                    raise
                retry = _PendingBlock(key, needed=True)
                self._wanted = {key: retry, **{other: block for other, block in self._wanted.items() if other != key}}
                self._start()
        try:
            return retry.block.result()
        except DataError:
            with self._lock:
                self._wanted.pop(key, None)
            raise

    def close(self) -> None:
        """Release all blocks; :meth:`get` and :meth:`want` raise a DataError until :meth:`reopen`."""
        with self._lock:
            self._closed = True
            for pending in self._wanted.values():
                pending.fail(DataError(_CLOSED))
            self._wanted = {}

    def reopen(self) -> bool:
        """Undo :meth:`close`; returns whether it was closed."""
        with self._lock:
            was_closed, self._closed = self._closed, False
        return was_closed

    def _start(self) -> None:
        """Start as many of the wanted blocks as the threads allow. The lock is held."""
        # Blocks that are no longer wanted do not count: their reads may be stuck, and must not block the others.
        building = sum(pending.started and not pending.block.done() for pending in self._wanted.values())
        for pending in self._wanted.values():
            if pending.started:
                continue
            shards = self._shards_of(pending.key)
            if building and (building + 1) * len(shards) > self._threads:
                return
            building += 1
            pending.start(shards, threads=min(self._threads, len(shards)))
            for _ in range(pending.threads):
                threading.Thread(target=self._work, args=(pending,), name="dcscale-read", daemon=True).start()

    def _work(self, pending: _PendingBlock) -> None:
        """Read shards of a block until none is left; the last thread to finish builds the block."""
        while (item := self._next(pending)) is not None:
            position, shard = item
            try:
                pending.contents[position] = self._read(shard, pending.needed)
            except BaseException as error:  # raised by get()
                pending.fail(error)
        with self._lock:
            pending.threads -= 1
            if pending.threads:
                return
        try:
            if not pending.block.done() and self._wanted.get(pending.key) is pending:
                pending.finish(self._build(pending.key, pending.contents))
        except BaseException as error:  # raised by get()
            pending.fail(error)
        pending.contents = []  # free the raw shards
        with self._lock:
            self._start()

    def _next(self, pending: _PendingBlock) -> tuple[int, int] | None:
        """(position in the block, shard) to read next; None if none is left or the block is no longer wanted."""
        with self._lock:
            if not pending.unread or pending.block.done() or self._wanted.get(pending.key) is not pending:
                return None
            return pending.unread.pop(0)


class _PendingBlock:
    """A block that is to be built, is being built, or is done."""

    def __init__(self, key: BlockKey, needed: bool = False) -> None:
        self.key, self.needed = key, needed
        self.block: Future[ShuffleBlock] = Future()
        self.started = False
        self.unread: list[tuple[int, int]] = []
        self.contents: list[Any] = []
        self.threads = 0
        self._end = threading.Lock()

    def start(self, shards: list[int], threads: int) -> None:
        self.started, self.threads = True, threads
        self.unread, self.contents = list(enumerate(shards)), [None] * len(shards)

    def finish(self, block: ShuffleBlock) -> None:
        with self._end:
            if not self.block.done():
                self.block.set_result(block)

    def fail(self, error: BaseException) -> None:
        with self._end:
            if not self.block.done():
                self.block.set_exception(error)
