"""Windows made of shards by threads, ahead of need."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

from dcscale.data.errors import DataError
from dcscale.data.stream.sequences import Window

Key = tuple[int, int]
"""(epoch, number of the window in it)."""

_CLOSED = "reading was ended"


class BlockPrefetcher:
    """Makes the windows that are wanted, the first first, and keeps them as long as they are.

    The shards of a window are read by up to ``threads`` threads at once; where a window has fewer shards, several
    windows are made at a time. So the raw shards held are at most ``threads`` or those of one window, whichever is
    more, and those that are still being read for windows wanted no more. The threads end with their window; being
    daemons, they never keep a process from ending.

    Args:
        shards_of: shards of a window.
        read: reads one shard; its last argument says that the window is needed now, and this is the last try.
        pack: makes a window of what was read of its shards.
        threads: shards read at once.
    """

    def __init__(
        self,
        shards_of: Callable[[Key], list[int]],
        read: Callable[[int, bool], Any],
        pack: Callable[[Key, list[Any]], Window],
        threads: int,
    ) -> None:
        self._shards_of, self._read, self._pack, self._threads = shards_of, read, pack, threads
        self._lock = threading.Lock()
        self._wanted: dict[Key, _Making] = {}
        self._closed = False

    def __len__(self) -> int:
        """Windows held, or to be made."""
        return len(self._wanted)

    def want(self, keys: Iterable[Key]) -> None:
        """Keep these windows and no others; those that are not there are made, in this order.

        Raises:
            DataError: the reader is closed.
        """
        with self._lock:
            if self._closed:
                raise DataError(_CLOSED)
            self._wanted = {key: self._wanted.get(key) or _Making(key) for key in keys}
            self._start()

    def get(self, key: Key) -> Window:
        """A wanted window; waits for it.

        What kept it from being made may have passed since, so it is then tried once more.

        Raises:
            DataError: it cannot be made.
        """
        making = self._wanted.get(key)
        if making is None:  # closed since it was wanted
            raise DataError(_CLOSED)
        try:
            return making.window.result()
        except DataError:
            with self._lock:
                if self._wanted.get(key) is not making:  # closed meanwhile
                    raise
                again = _Making(key, needed=True)
                self._wanted = {key: again, **{kept: made for kept, made in self._wanted.items() if kept != key}}
                self._start()
        try:
            return again.window.result()
        except DataError:
            with self._lock:
                self._wanted.pop(key, None)
            raise

    def close(self) -> None:
        """Let go of all windows; who waits for one, or wants one, gets a DataError until it is opened again."""
        with self._lock:
            self._closed = True
            for making in self._wanted.values():
                making.fail(DataError(_CLOSED))
            self._wanted = {}

    def open(self) -> bool:
        """Undo :meth:`close`; returns whether it was closed."""
        with self._lock:
            was_closed, self._closed = self._closed, False
        return was_closed

    def _start(self) -> None:
        # What is wanted no more does not count: it may be stuck, and must not keep others waiting.
        in_making = sum(making.started and not making.window.done() for making in self._wanted.values())
        for making in self._wanted.values():
            if making.started:
                continue
            shards = self._shards_of(making.key)
            if in_making and (in_making + 1) * len(shards) > self._threads:
                return
            in_making += 1
            making.start(shards, threads=min(self._threads, len(shards)))
            for _ in range(making.threads):
                threading.Thread(target=self._work, args=(making,), name="dcscale-read", daemon=True).start()

    def _work(self, making: _Making) -> None:
        """Reads shards of a window until none is left; who comes last packs it."""
        while (item := self._next(making)) is not None:
            place, shard = item
            try:
                making.parts[place] = self._read(shard, making.needed)
            except BaseException as error:  # raised by who needs the window
                making.fail(error)
        with self._lock:
            making.threads -= 1
            if making.threads:
                return
        try:
            if not making.window.done() and self._wanted.get(making.key) is making:
                making.finish(self._pack(making.key, making.parts))
        except BaseException as error:  # as above
            making.fail(error)
        making.parts = []
        with self._lock:
            self._start()

    def _next(self, making: _Making) -> tuple[int, int] | None:
        with self._lock:
            if not making.todo or making.window.done() or self._wanted.get(making.key) is not making:
                return None
            return making.todo.pop(0)


class _Making:
    """A window on its way."""

    def __init__(self, key: Key, needed: bool = False) -> None:
        self.key, self.needed = key, needed
        self.window: Future[Window] = Future()
        self.started = False
        self.todo: list[tuple[int, int]] = []
        self.parts: list[Any] = []
        self.threads = 0
        self._end = threading.Lock()

    def start(self, shards: list[int], threads: int) -> None:
        self.started, self.threads = True, threads
        self.todo, self.parts = list(enumerate(shards)), [None] * len(shards)

    def finish(self, window: Window) -> None:
        with self._end:
            if not self.window.done():
                self.window.set_result(window)

    def fail(self, error: BaseException) -> None:
        with self._end:
            if not self.window.done():
                self.window.set_exception(error)
