"""From the words of a config to a source."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dcscale.data.errors import DataError
from dcscale.data.sources.base import Source
from dcscale.data.sources.cache import CachedSource
from dcscale.data.sources.folder import FolderSource
from dcscale.data.sources.http import HttpSource
from dcscale.data.sources.joined import JoinedSource
from dcscale.data.sources.objects import SCHEMES, ObjectSource
from dcscale.data.sources.patterns import expand, scheme_of, shown
from dcscale.data.sources.retry import Patience


@dataclass(frozen=True)
class Access:
    """How places outside this machine are read."""

    patience: Patience = field(default_factory=Patience)
    """What a slow or failing place is granted."""

    cache: Path | None = None
    """Folder on a local disk that keeps shards; see :class:`dcscale.data.sources.cache.CachedSource`."""

    cache_bytes: int = 1 << 36
    """Bytes of that folder, at most."""


def open_source(root: str | Path | Source, access: Access | None = None) -> Source:
    """Open a root.

    Args:
        root: a folder, or an address that begins with ``http://``, ``https://``, ``s3://`` or ``gs://``. A text may be
            a pattern, see :mod:`dcscale.data.sources.patterns`; several roots are then read as one, in that order.
            A source is returned as it is.
        access: how a place outside this machine is read; None takes the defaults.

    Raises:
        DataError: there is no such root, or roots of this kind are not read.
    """
    access = access or Access()
    if isinstance(root, Source):
        return root
    if isinstance(root, Path):
        return FolderSource(root)
    roots = expand(root, lambda pattern: ObjectSource(pattern, access.patience).glob())
    parts = [_open_one(one, access) for one in roots]
    if len(parts) == 1:
        return parts[0]
    return JoinedSource(parts, f"{parts[0]} and {len(parts) - 1} more")


def _open_one(root: str, access: Access) -> Source:
    scheme = scheme_of(root)
    if scheme is None:
        return FolderSource(Path(root))
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
        return _cached(HttpSource(root, access.patience), access)
    if scheme in SCHEMES:
        return _cached(ObjectSource(root, access.patience), access)
    raise DataError(
        f"{shown(root)}: {scheme}: is no kind of place that shards are read from; give a folder, or an address that "
        f"begins with http://, https://, s3:// or gs://"
    )


def _cached(source: Source, access: Access) -> Source:
    return source if access.cache is None else CachedSource(source, access.cache, access.cache_bytes)
