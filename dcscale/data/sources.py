"""Where shards lie. Objects are read as a whole and checked against their manifest before anyone sees a byte.

A :class:`Source` is a root and the objects below it, by their name relative to it. Names come from a manifest, whose
rules keep them inside their root; nothing here starts a process or a shell.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path

from dcscale.data.errors import DataError


class UnreadableError(DataError):
    """An object that cannot be had.

    Args:
        where: path or address of the object.
        reason: what kept it from being read.
        missing: whether there is no such object, so far as one can tell.
    """

    def __init__(self, where: str, reason: str, *, missing: bool = False) -> None:
        super().__init__(f"{where}: cannot be read: {reason}")
        self.where, self.reason, self.missing = where, reason, missing


class ContentError(DataError):
    """An object that was read and is not the one that was asked for."""


class Source(ABC):
    """A root of shards; ``str()`` is how messages name it."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Path or address of an object, for messages."""

    @abstractmethod
    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        """The whole object ``name``.

        Args:
            name: path relative to the root, with forward slashes.
            size: its bytes, where known.
            sha256: its checksum, where it is to be checked.

        Raises:
            UnreadableError: it is missing or cannot be read.
            ContentError: it has another size or checksum.
        """

    @abstractmethod
    def check(self, sizes: Mapping[str, int]) -> None:
        """Check without reading that objects are there and have these sizes, as far as that can be told quickly.

        Raises:
            UnreadableError: one is missing or cannot be looked at.
            ContentError: one has another size.
        """


def check_content(where: str, data: bytes, size: int | None, sha256: str | None) -> None:
    """Check bytes against what is known about them.

    Raises:
        ContentError: they differ.
    """
    check_size(where, len(data), size)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ContentError(f"{where}: its SHA-256 is {found}, but the manifest says {sha256}")


def check_size(where: str, found: int, size: int | None) -> None:
    """Check a number of bytes against what is known about it.

    Raises:
        ContentError: it differs.
    """
    if size is not None and found != size:
        raise ContentError(f"{where}: it has {found} bytes, but the manifest says {size}: it was cut off or replaced")


class FolderSource(Source):
    """A folder of this machine.

    Raises:
        DataError: there is no such folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; give a folder of shards, as tools/make_shards.py writes it")

    def __str__(self) -> str:
        return str(self.folder)

    def where(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise self._unreadable(name, error) from error
        check_content(self.where(name), data, size, sha256)
        return data

    def check(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            try:
                found = (self.folder / name).stat().st_size
            except OSError as error:
                raise self._unreadable(name, error) from error
            check_size(self.where(name), found, size)

    def _unreadable(self, name: str, error: OSError) -> UnreadableError:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return UnreadableError(self.where(name), error.strerror or str(error), missing=missing)


def open_source(root: str | Path | Source) -> Source:
    """Open a root.

    Args:
        root: a folder; a source is returned as it is.

    Raises:
        DataError: there is no such root, or roots of this kind are not read.
    """
    if isinstance(root, Source):
        return root
    if isinstance(root, str) and (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", root)):
        raise DataError(f"{root}: {scheme[1]}: is no kind of place that shards are read from; give a folder")
    return FolderSource(Path(root))
