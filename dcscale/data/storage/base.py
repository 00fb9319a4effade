"""The interface of a storage of shards, and the errors of reading from one."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping

from dcscale.data.errors import DataError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


def url_scheme(root: str) -> str | None:
    """The scheme of an address, such as ``http`` of ``http://...``; None for a path."""
    found = _SCHEME.match(root)
    return found[1] if found else None


def redact(root: str) -> str:
    """A root for messages: without credentials, and without the query, which may contain secrets."""
    scheme = url_scheme(root)
    if scheme is None:
        return root
    address, query, _ = root.partition("?") if scheme in ("http", "https") else (root, "", "")
    return re.sub(r"(?<=://)[^/]*@", "", address) + (query and "?...")


class UnreadableError(DataError):
    """An object is missing or cannot be read.

    Args:
        location: path or address of the object.
        reason: why it cannot be read.
        missing: whether the object is known not to exist.
        retry: see :class:`DataError`.
    """

    def __init__(self, location: str, reason: str, *, missing: bool = False, retry: bool = False) -> None:
        super().__init__(f"{location}: cannot be read: {reason}", retry=retry)
        self.location, self.reason, self.missing = location, reason, missing


class ContentError(DataError):
    """An object was read, but its size or checksum is not the expected one."""


class Storage(ABC):
    """A root of shards. ``str()`` names it in messages, without secrets."""

    @abstractmethod
    def location(self, name: str) -> str:
        """Path or address of an object, for messages."""

    @abstractmethod
    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        """Read the entire object ``name``.

        Args:
            name: path relative to the root, with forward slashes.
            size: its size in bytes, if known.
            sha256: its checksum in hexadecimal; None does not check it.

        Raises:
            UnreadableError: it is missing or cannot be read.
            ContentError: it has another size or checksum.
        """

    @abstractmethod
    def check(self, sizes: Mapping[str, int]) -> None:
        """Check, without reading them, that objects exist and have these sizes. A remote storage checks a sample.

        Args:
            sizes: name -> size in bytes.

        Raises:
            UnreadableError: one is missing or cannot be accessed.
            ContentError: one has another size.
        """

    @abstractmethod
    def close(self) -> None:
        """Make reads in progress fail instead of being retried. Later reads are not affected."""


def check_content(location: str, data: bytes, size: int | None, sha256: str | None) -> None:
    """Check the size and the checksum of an object, each unless it is None.

    Raises:
        ContentError: one of them differs.
    """
    check_size(location, len(data), size)
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise ContentError(f"{location}: its SHA-256 is {found}, but the manifest says {sha256}")


def check_size(location: str, found: int, size: int | None) -> None:
    """Check the size of an object in bytes, unless ``size`` is None.

    Raises:
        ContentError: it differs.
    """
    if size is not None and found != size:
        message = f"it has {found} bytes, but the manifest says {size}: it was cut off or replaced"
        raise ContentError(f"{location}: {message}")
