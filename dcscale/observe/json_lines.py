"""Logs that survive a full disk: training continues, and nothing is lost but what exceeds a bound."""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from dcscale.files import write_atomically


class AppendedFile:
    """Appends entries to a file, and gives each to the operating system at once.

    Entries that a failing disk does not take are kept in memory and written before the next one, in order. A part of an
    entry, left by a failed write, is cut off before the next one is appended, so that every entry is complete. May be
    called by several threads.

    Args:
        path: the file; created, with its folder, or emptied.
        warn: called once when writing begins to fail, and once when it works again.
        most_pending: entries that are kept in memory at most; the oldest are lost beyond that, which is reported.
        before_opening: called before the file is opened, also after a failure, since another process may have put a
            file of its own in its place by then; what it raises, other than OSError, is raised by :meth:`append`.
        open_file: opens the file for reading and appending, without a buffer.
    """

    entries = "entries"
    """What they are called in messages."""

    def __init__(
        self,
        path: Path,
        warn: Callable[[str], None],
        most_pending: int = 10_000,
        before_opening: Callable[[], None] = lambda: None,
        open_file: Callable[[Path], FileIO] = lambda path: path.open("a+b", buffering=0),
    ):
        self._path, self._warn, self._before_opening, self._open_file = path, warn, before_opening, open_file
        self._pending: deque[bytes] = deque(maxlen=most_pending)
        self._lost = 0
        self._failing = False
        self._file: FileIO | None = None
        self._lock = threading.Lock()
        self.size = 0
        """Bytes of complete entries in the file, as far as this process knows."""

    def append(self, entry: bytes) -> None:
        """Appends an entry. A failing disk raises nothing."""
        with self._lock:
            self._lost += len(self._pending) == self._pending.maxlen
            self._pending.append(entry)
            self._try(self._append_pending)

    def close(self) -> None:
        """Writes what is pending and makes the file durable; reports what is lost because the disk fails."""
        with self._lock:
            self._try(self._finish)
            if self._pending:
                self._warn(f"{len(self._pending)} {self.entries} could not be written to {self._path} and are lost")

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._warn(
                    f"{self._path} cannot be written: {error.strerror or error}. Training continues; "
                    f"{self.entries} are kept in memory until they can be written"
                )
            # The handle may be stale, and the file may end in a part of an entry: the next attempt opens it again.
            with contextlib.suppress(OSError):  # network disks report here again what the write has reported
                self._close_file()
            return
        if self._failing:
            self._failing = False
            lost = f", but the oldest {self._lost} {self.entries} are lost" if self._lost else ""
            self._warn(f"{self._path} can be written again{lost}")
            self._lost = 0

    def _append_pending(self) -> None:
        if self._file is None:
            self._before_opening()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._open_file(self._path)
            self.size = self._cut_partial_entry(self._file)
        while self._pending:
            rest = memoryview(self._pending[0])
            try:
                while rest:  # a disk that is nearly full takes a part, and then fails
                    rest = rest[self._file.write(rest) :]
            except OSError:
                with contextlib.suppress(OSError):  # if it cannot be cut off now, it is when the file is opened again
                    self._file.truncate(self.size)
                raise
            self.size += len(self._pending.popleft())

    def _finish(self) -> None:
        if self._pending or self._file is not None:
            self._append_pending()
            assert self._file is not None
            os.fsync(self._file.fileno())
            self._close_file()

    def _close_file(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _cut_partial_entry(self, file: FileIO) -> int:
        """Truncates the file after its last complete entry; returns its size."""
        file.truncate(self.size)
        return self.size


class JsonLines(AppendedFile):
    """Appends JSON objects to a file, one a line, also to those of an earlier process, which may have been killed."""

    entries = "lines"

    def write(self, value: Mapping[str, Any]) -> None:
        """Appends a value. Infinities and NaN, which JSON has not, become the strings ``inf``, ``-inf`` and ``nan``.

        Raises:
            TypeError: it is not a JSON value. A failing disk raises nothing.
        """
        self.append(json.dumps(_finite(value)).encode() + b"\n")

    def replace(self, choose: Callable[[list[bytes]], Iterable[bytes]]) -> None:
        """Replaces the lines of the file by those of them that ``choose`` returns, atomically.

        Raises:
            OSError: the disk fails; the file is unchanged.
        """
        with self._lock:
            kept = choose(self._path.read_bytes().splitlines(keepends=True))
            write_atomically(self._path, b"".join(kept))
            self._close_file()

    def _cut_partial_entry(self, file: FileIO, block: int = 1 << 16) -> int:
        end = start = file.seek(0, os.SEEK_END)
        tail = b""
        while start > 0 and b"\n" not in tail:
            start = max(0, start - block)
            file.seek(start)
            tail = file.read(end - start)
        size = start + tail.rfind(b"\n") + 1
        if size < end:
            file.truncate(size)
        return size


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
