"""From the root that a config names to a storage; several roots are joined to one."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from braceexpand import UnbalancedBracesError, braceexpand

from dcscale.data.errors import DataError
from dcscale.data.storage.base import Storage, scheme_of, shown
from dcscale.data.storage.cache import CachedStorage
from dcscale.data.storage.http import HttpStorage
from dcscale.data.storage.local import LocalStorage
from dcscale.data.storage.object_store import SCHEMES, ObjectStorage
from dcscale.data.storage.retry import RetryPolicy


def expand(root: str, glob_objects: Callable[[str], Sequence[str]]) -> list[str]:
    """The roots that a pattern names: those of braces in the order in which they are written, those of ``*``, ``?`` and
    ``[...]`` sorted; a root without any of these, or a folder of exactly that name, is its own.

    Args:
        root: a path or an address.
        glob_objects: finds folders of an object store, see :meth:`ObjectStorage.glob`.

    Raises:
        DataError: nothing is there, the braces do not match, or ``*`` is used where folders cannot be listed.
    """
    scheme = scheme_of(root)
    if scheme is None and os.path.isdir(root):
        return [root]
    try:
        written = list(braceexpand(root))
    except UnbalancedBracesError as error:
        raise DataError(
            f"{shown(root)}: the braces do not match; write them as in part-{{00..15}} or {{a,b}}"
        ) from error
    roots: list[str] = []
    for one in written:
        found = [one]
        if scheme in ("http", "https"):
            if glob.has_magic(re.sub(r"^[^/]*//[^/]*", "", re.split(r"[?#]", one)[0])):  # [::1] may be the host
                raise DataError(
                    f"{shown(one)}: * and [ cannot be used here, since a web server does not list its folders; name "
                    f"them, as in part-{{00..15}}"
                )
        elif glob.has_magic(one):
            found = sorted(glob_objects(one)) if scheme else sorted(filter(os.path.isdir, glob.glob(one)))
            if not found:
                raise DataError(f"{one}: no folder has such a name; check the pattern")
        roots += found
    for number, one in enumerate(roots):
        if one.rstrip("/") in [other.rstrip("/") for other in roots[:number]]:
            raise DataError(
                f"{shown(root)}: names {shown(one)} twice, so its data would be trained on twice; name it once"
            )
    return roots


class UnionStorage(Storage):
    """Roots one after another; of part i, the shard ``NAME`` is called ``i/NAME`` here. What belongs to all of them,
    such as the tokenizer, is read from the first.

    Args:
        parts: the roots, in order.
        shown: how messages name them together.
    """

    def __init__(self, parts: Sequence[Storage], shown: str) -> None:
        self.parts, self._shown = list(parts), shown

    def __str__(self) -> str:
        return self._shown

    def where(self, name: str) -> str:
        part, rest = self._of(name)
        return part.where(rest) if rest != name else f"{self._shown}: {name}"

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        part, rest = self._of(name)
        return part.read(rest, size, sha256)

    def check(self, sizes: Mapping[str, int]) -> None:
        of_parts: dict[Storage, dict[str, int]] = {}
        for name, size in sizes.items():
            part, rest = self._of(name)
            of_parts.setdefault(part, {})[rest] = size
        for part, of_part in of_parts.items():
            part.check(of_part)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def _of(self, name: str) -> tuple[Storage, str]:
        number, _, rest = name.partition("/")
        return (self.parts[int(number)], rest) if rest else (self.parts[0], name)


@dataclass(frozen=True)
class StorageOptions:
    """How places outside this machine are read."""

    retry: RetryPolicy = field(default_factory=RetryPolicy)
    """What a slow or failing place is granted."""

    cache: Path | None = None
    """Folder on a local disk that keeps shards; see :class:`dcscale.data.storage.cache.CachedStorage`."""

    cache_bytes: int = 1 << 36
    """Bytes of that folder, at most."""


def open_storage(root: str | Path | Storage, storage_options: StorageOptions | None = None) -> Storage:
    """Open a root.

    Args:
        root: a folder, or an address that begins with ``http://``, ``https://``, ``s3://`` or ``gs://``. A text may be
            a pattern, see :mod:`dcscale.data.storage.open`; several roots are then read as one, in that order.
            A source is returned as it is.
        storage_options: how a place outside this machine is read; None takes the defaults.

    Raises:
        DataError: there is no such root, or roots of this kind are not read.
    """
    storage_options = storage_options or StorageOptions()
    if isinstance(root, Storage):
        return root
    if isinstance(root, Path):
        return LocalStorage(root)
    roots = expand(root, lambda pattern: ObjectStorage(pattern, storage_options.retry).glob())
    parts = [_open_one(one, storage_options) for one in roots]
    if len(parts) == 1:
        return parts[0]
    return UnionStorage(parts, f"{parts[0]} and {len(parts) - 1} more")


def _open_one(root: str, storage_options: StorageOptions) -> Storage:
    scheme = scheme_of(root)
    if scheme is None:
        return LocalStorage(Path(root))
    if scheme in ("http", "https"):
        try:
            address = urlsplit(root)
            well_formed = address.hostname and address.port != 0
        except ValueError:  # a port that is no number up to 65535, or [ without ]
            well_formed = False
        if not well_formed:
            raise DataError(
                f"{shown(root)}: names no host, or no port from 1 to 65535; write it as {scheme}://HOST/FOLDER or "
                f"{scheme}://HOST:PORT/FOLDER"
            )
        return _cached(HttpStorage(root, storage_options.retry), storage_options)
    if scheme in SCHEMES:
        return _cached(ObjectStorage(root, storage_options.retry), storage_options)
    raise DataError(
        f"{shown(root)}: {scheme}: is no kind of place that shards are read from; give a folder, or an address that "
        f"begins with http://, https://, s3:// or gs://"
    )


def _cached(source: Storage, storage_options: StorageOptions) -> Storage:
    return (
        source
        if storage_options.cache is None
        else CachedStorage(source, storage_options.cache, storage_options.cache_bytes)
    )
