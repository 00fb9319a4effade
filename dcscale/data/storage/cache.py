"""A size-limited cache of shards on a local disk, shared by all processes of a machine.

The name of an entry is the SHA-256 of its content. Different shards of the same name therefore cannot be confused, the
same shard at two addresses is stored once, and every entry is checked when it is read: a corrupt entry costs one more
download. An entry is renamed into place when it is complete. A process holds a lock on the entry that it writes; an
unfinished entry without a lock was left by a killed process and is removed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

from dcscale.data.errors import DataError
from dcscale.data.storage.base import ContentError, Storage, check_content

_UNFINISHED = ".unfinished-"
_ENTRY = re.compile(r"[0-9a-f]{64}")
_log = logging.getLogger("dcscale.data")


class CachedStorage(Storage):
    """Another storage, whose objects of known checksum are kept in ``folder``; others are read from it every time.

    All entries together, unfinished ones included, take at most ``max_bytes``; the least recently used are removed. If
    the disk fails or is full, reading continues without storing new entries.

    Args:
        storage: the storage to read from.
        folder: folder of the entries; created if missing. Files in it that are not entries are left alone.
        max_bytes: the limit, for all processes that use the folder.

    Raises:
        DataError: the folder cannot be created.
    """

    def __init__(self, storage: Storage, folder: Path, max_bytes: int) -> None:
        self._storage, self._folder, self._max_bytes = storage, folder, max_bytes
        self._writable = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"data.cache is {folder}, but this folder cannot be created: {error.strerror}"
            raise DataError(f"{message}; name another, or null") from error

    def __str__(self) -> str:
        return str(self._storage)

    def location(self, name: str) -> str:
        return self._storage.location(name)

    def check(self, sizes: Mapping[str, int]) -> None:
        self._storage.check(sizes)

    def close(self) -> None:
        self._storage.close()

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        if sha256 is None:
            return self._storage.read(name, size, sha256)
        data = self._load(size, sha256)
        if data is None:
            data = self._storage.read(name, size, sha256)
            if self._writable:
                self._store(data, sha256)
        return data

    def _load(self, size: int | None, sha256: str) -> bytes | None:
        """The content of an entry; None if it is missing or corrupt."""
        path = self._folder / sha256
        try:
            data = path.read_bytes()
            check_content(str(path), data, size, sha256)
        except FileNotFoundError:
            return None
        except (ContentError, OSError) as error:
            _log.warning("%s; this entry of data.cache is fetched again", error)
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):  # another process may have evicted it in the meantime
            os.utime(path)  # eviction goes by the modification time
        return data

    def _store(self, data: bytes, sha256: str) -> None:
        try:
            with self._reserve(len(data)) as file:
                file.write(data)
                file.flush()
                with self._lock():
                    os.replace(file.name, self._folder / sha256)
        except OSError as error:
            self._writable = False
            _log.warning("this process writes no more entries to data.cache in %s: %s", self._folder, error)

    @contextmanager
    def _reserve(self, size: int) -> Iterator[IO[bytes]]:
        """A new, locked file that already counts as an entry of ``size`` bytes; others are evicted for it."""
        if size > self._max_bytes:
            raise OSError(f"a shard of {size} bytes is more than data.cache_bytes, {self._max_bytes}")
        with ExitStack() as stack:
            with self._lock():
                self._evict(size)
                file = stack.enter_context(NamedTemporaryFile(prefix=_UNFINISHED, dir=self._folder, delete=False))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(size)  # so that other processes count these bytes from now on
            try:
                yield file
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @contextmanager
    def _lock(self) -> Iterator[None]:
        """Exclusive lock of the folder, between processes."""
        file = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _evict(self, size: int) -> None:
        """Remove the least recently used entries until ``size`` more bytes fit; the caller holds the lock."""
        entries, total = [], size
        for child in os.scandir(self._folder):
            unfinished = child.name.startswith(_UNFINISHED)
            with suppress(FileNotFoundError):  # removed by a process that found it corrupt
                if unfinished and _is_abandoned(child.path):
                    os.unlink(child.path)
                elif unfinished or _ENTRY.fullmatch(child.name):
                    stat = child.stat()
                    total += stat.st_size
                    if not unfinished:
                        entries.append((stat.st_mtime_ns, stat.st_size, child.path))
        for _, freed, path in sorted(entries):
            if total <= self._max_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= freed
        if total > self._max_bytes:
            raise OSError(f"what other processes are writing to it fills data.cache_bytes, {self._max_bytes}")


def _is_abandoned(path: str) -> bool:
    """Whether no process holds the lock of an unfinished entry."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
