"""Opens the root that a config names. A root may be a pattern that names several roots, which are read as one.

Braces expand as in a shell: ``{a,b}``, ``{00..15}``. ``*``, ``?`` and ``[...]`` match folders, where a storage can list
them: on this machine and in object stores.
"""

from __future__ import annotations

import glob
import os
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import UnbalancedBracesError, braceexpand

from dcscale.data.errors import DataError
from dcscale.data.storage.base import Storage, redact, url_scheme
from dcscale.data.storage.cache import CachedStorage
from dcscale.data.storage.http import HttpStorage
from dcscale.data.storage.local import LocalStorage
from dcscale.data.storage.object_store import SCHEMES, ObjectStorage
from dcscale.data.storage.retry import RetryPolicy


def expand_pattern(root: str, glob_objects: Callable[[str], Sequence[str]]) -> list[str]:
    """The roots that a pattern names.

    Braces keep the order in which they are written; the matches of ``*``, ``?`` and ``[...]`` are sorted. A root
    without any of these, or an existing folder of exactly that name, is returned as it is.

    Args:
        root: a path or an address.
        glob_objects: finds folders of an object store, see :meth:`ObjectStorage.glob`.

    Raises:
        DataError: nothing matches, the braces do not match, a folder is named twice, also under different names, or
            ``*`` is used for a web server.
    """
    scheme = url_scheme(root)
    if scheme is None and os.path.isdir(root):
        return [root]
    try:
        patterns = list(braceexpand(root))
    except UnbalancedBracesError as error:
        raise DataError(
            f"{redact(root)}: the braces do not match; write them as in part-{{00..15}} or {{a,b}}"
        ) from error
    roots: list[str] = []
    for pattern in patterns:
        found = [pattern]
        if scheme in ("http", "https"):
            # Only the path may not be a pattern: [::1] is a valid host, and a query may hold any of these characters.
            if glob.has_magic(re.sub(r"^[^/]*//[^/]*", "", re.split(r"[?#]", pattern)[0])):
                raise DataError(
                    f"{redact(pattern)}: * and [ cannot be used here, since a web server does not list its folders; "
                    f"name them, as in part-{{00..15}}"
                )
        elif glob.has_magic(pattern):
            found = sorted(glob_objects(pattern)) if scheme else sorted(filter(os.path.isdir, glob.glob(pattern)))
            if not found:
                raise DataError(f"{pattern}: no folder matches; check the pattern")
        roots += found
    root_of_key: dict[str, str] = {}
    for one in roots:
        if (key := _root_key(one)) in root_of_key:
            raise DataError(
                f"{redact(root)}: {redact(root_of_key[key])} and {redact(one)} are the same folder, so its data would "
                f"be used twice; name it once"
            )
        root_of_key[key] = one
    return roots


def _root_key(root: str) -> str:
    """The same text for all ways to write a root."""
    if url_scheme(root) is None:
        return os.path.realpath(root)
    web = re.fullmatch(r"(https?)://(?:[^/?#]*@)?([^/?#]*)([^?#]*)(.*)", root)
    if web is None:  # in an object store . and // are part of the name
        return root.rstrip("/")
    scheme, host, path, rest = web.groups()
    host = host.lower().removesuffix(":443" if scheme == "https" else ":80")
    return f"{scheme}://{host}{posixpath.normpath('/' + path.lstrip('/'))}{rest}"


class UnionStorage(Storage):
    """Several roots read as one. Shard ``NAME`` of part ``i`` is named ``i/NAME`` here.

    Objects that belong to all parts, such as the tokenizer, have names without a part and are read from the first.

    Args:
        parts: the roots, in order.
        name: how messages name them together.
    """

    def __init__(self, parts: Sequence[Storage], name: str) -> None:
        self.parts, self._name = list(parts), name

    def __str__(self) -> str:
        return self._name

    def location(self, name: str) -> str:
        part, rest = self._part(name)
        return part.location(rest) if rest != name else f"{self._name}: {name}"

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        part, rest = self._part(name)
        return part.read(rest, size, sha256)

    def check(self, sizes: Mapping[str, int]) -> None:
        sizes_of_part: dict[Storage, dict[str, int]] = {}
        for name, size in sizes.items():
            part, rest = self._part(name)
            sizes_of_part.setdefault(part, {})[rest] = size
        for part, part_sizes in sizes_of_part.items():
            part.check(part_sizes)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _part(self, name: str) -> tuple[Storage, str]:
        """(part, name in the part) of an object."""
        number, _, rest = name.partition("/")
        return (self.parts[int(number)], rest) if rest else (self.parts[0], name)


@dataclass(frozen=True)
class StorageOptions:
    """How storages outside this machine are read."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """How long reads from a slow or failing storage are retried."""

    cache: Path | None = None
    """Folder on a local disk that keeps shards, see :class:`dcscale.data.storage.cache.CachedStorage`; None: none."""

    cache_bytes: int = 1 << 36
    """Largest size of the cache in bytes."""


def open_storage(root: str | Path | Storage, storage_options: StorageOptions | None = None) -> Storage:
    """Open a root.

    Args:
        root: a folder, or an address that begins with ``http://``, ``https://``, ``s3://`` or ``gs://``. A string may
            be a pattern, see :mod:`dcscale.data.storage.open`; several roots are then read as one, in that order.
            A storage is returned as it is.
        storage_options: how a root outside this machine is read; None takes the defaults.

    Raises:
        DataError: there is no such root, or its scheme is not supported.
    """
    storage_options = storage_options or StorageOptions()
    if isinstance(root, Storage):
        return root
    if isinstance(root, Path):
        return LocalStorage(root)
    roots = expand_pattern(root, lambda pattern: ObjectStorage(pattern, storage_options.retry).glob())
    parts = [_open_one(one, storage_options) for one in roots]
    if len(parts) == 1:
        return parts[0]
    return UnionStorage(parts, f"{parts[0]} and {len(parts) - 1} more")


def _open_one(root: str, storage_options: StorageOptions) -> Storage:
    scheme = url_scheme(root)
    if scheme is None:
        return LocalStorage(Path(root))
    if scheme in ("http", "https"):
        try:
            address = urlsplit(root)
            valid = address.hostname and address.port != 0
        except ValueError:  # a port that is not a number up to 65535, or [ without ]
            valid = False
        if not valid:
            raise DataError(
                f"{redact(root)}: has no host, or a port that is not from 1 to 65535; write it as "
                f"{scheme}://HOST/FOLDER or {scheme}://HOST:PORT/FOLDER"
            )
        return _cached(HttpStorage(root, storage_options.retry), storage_options)
    if scheme in SCHEMES:
        return _cached(ObjectStorage(root, storage_options.retry), storage_options)
    raise DataError(
        f"{redact(root)}: shards cannot be read from {scheme}:; give a folder, or an address that begins with "
        f"http://, https://, s3:// or gs://"
    )


def _cached(storage: Storage, storage_options: StorageOptions) -> Storage:
    if storage_options.cache is None:
        return storage
    return CachedStorage(storage, storage_options.cache, storage_options.cache_bytes)
