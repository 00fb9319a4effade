"""What a place of shards can do, and the errors of reading from one."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

from dcscale.data.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def scheme_of(root: str) -> str | None:
    """``http`` of ``http://...`` and the like; None for a path."""
    found = _SCHEME.match(root)
    return found[1] if found else None


def shown(root: str) -> str:
    """A root as messages name it: without credentials, and without a query, which may hold some."""
    scheme = scheme_of(root)
    if scheme is None:
        return root
    place, query, _ = root.partition("?") if scheme in ("http", "https") else (root, "", "")
    return re.sub(r"(?<=://)[^/]*@", "", place) + (query and "?...")


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


class Storage(ABC):
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

    @abstractmethod
    def close(self) -> None:
        """Let reads under way end soon, without what they were to read; later ones are not affected."""


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
