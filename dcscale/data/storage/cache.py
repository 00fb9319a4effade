"""A bounded store of shards on a local disk, shared by all processes of a machine.

An entry's name is the checksum of its content. So shards of equal names cannot be mistaken for each other, the same
shard under two addresses is kept once, and what is found is checked before it is used: a damaged entry costs one more
download. An entry appears when it is whole; what a killed process leaves unfinished is recognised by its lock, which
died with it, and removed.
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
    """Objects whose checksum is known are kept in ``folder``; the others come from ``source`` every time.

    The entries, unfinished ones included, have at most ``most_bytes`` bytes together; those unused for the longest are
    removed. If the disk fails or is full, reading goes on without it.

    Args:
        source: where the objects come from.
        folder: made if it is not there; files in it that are not entries are left alone.
        most_bytes: the limit, for all processes that use the folder.

    Raises:
        DataError: there can be no such folder.
    """

    def __init__(self, source: Storage, folder: Path, most_bytes: int) -> None:
        self._source, self._folder, self._most_bytes = source, folder, most_bytes
        self._kept = True
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"data.cache is {folder}, where no folder can be made: {error.strerror}; name another, or null"
            ) from error

    def __str__(self) -> str:
        return str(self._source)

    def where(self, name: str) -> str:
        return self._source.where(name)

    def check(self, sizes: Mapping[str, int]) -> None:
        self._source.check(sizes)

    def close(self) -> None:
        self._source.close()

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        if sha256 is None:
            return self._source.read(name, size, sha256)
        data = self._find(size, sha256)
        if data is None:
            data = self._source.read(name, size, sha256)
            if self._kept:
                self._keep(data, sha256)
        return data

    def _find(self, size: int | None, sha256: str) -> bytes | None:
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
        with suppress(OSError):  # it may have been removed for room meanwhile
            os.utime(path)
        return data

    def _keep(self, data: bytes, sha256: str) -> None:
        try:
            with self._reserved(len(data)) as file:
                file.write(data)
                file.flush()
                with self._lock():
                    os.replace(file.name, self._folder / sha256)
        except OSError as error:
            self._kept = False
            _log.warning("data.cache in %s gets no more entries from this process: %s", self._folder, error)

    @contextmanager
    def _reserved(self, size: int) -> Iterator[IO[bytes]]:
        """A new, locked file that counts as an entry of ``size`` bytes already; for it, others are removed."""
        if size > self._most_bytes:
            raise OSError(f"a shard of {size} bytes is more than data.cache_bytes, {self._most_bytes}")
        with ExitStack() as stack:
            with self._lock():
                self._make_room(size)
                file = stack.enter_context(NamedTemporaryFile(prefix=_UNFINISHED, dir=self._folder, delete=False))
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(size)
            try:
                yield file
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @contextmanager
    def _lock(self) -> Iterator[None]:
        file = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def _make_room(self, size: int) -> None:
        entries, total = [], size
        for child in os.scandir(self._folder):
            unfinished = child.name.startswith(_UNFINISHED)
            with suppress(FileNotFoundError):  # removed by a process that found it damaged
                if unfinished and _is_abandoned(child.path):
                    os.unlink(child.path)
                elif unfinished or _ENTRY.fullmatch(child.name):
                    about = child.stat()
                    total += about.st_size
                    if not unfinished:
                        entries.append((about.st_mtime_ns, about.st_size, child.path))
        for _, freed, path in sorted(entries):
            if total <= self._most_bytes:
                break
            Path(path).unlink(missing_ok=True)
            total -= freed
        if total > self._most_bytes:
            raise OSError(f"what other processes are writing to it takes all of data.cache_bytes, {self._most_bytes}")


def _is_abandoned(path: str) -> bool:
    """Whether nobody holds the lock of an unfinished entry any more."""
    with open(path, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
