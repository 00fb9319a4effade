"""From the words of a config to a source."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from dcscale.data.errors import DataError
from dcscale.data.sources.base import Source
from dcscale.data.sources.folder import FolderSource
from dcscale.data.sources.http import HttpSource
from dcscale.data.sources.objects import SCHEMES, ObjectSource
from dcscale.data.sources.retry import Patience


@dataclass(frozen=True)
class Access:
    """How places outside this machine are read."""

    patience: Patience = field(default_factory=Patience)
    """What a slow or failing place is granted."""


def open_source(root: str | Path | Source, access: Access | None = None) -> Source:
    """Open a root.

    Args:
        root: a folder, or an address that begins with ``http://``, ``https://``, ``s3://`` or ``gs://``; a source is
            returned as it is.
        access: how a place outside this machine is read; None takes the defaults.

    Raises:
        DataError: there is no such root, or roots of this kind are not read.
    """
    access = access or Access()
    if isinstance(root, Source):
        return root
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", str(root))
    if scheme is None or isinstance(root, Path):
        return FolderSource(Path(root))
    if scheme[1] in ("http", "https"):
        if not urlsplit(root).hostname:
            raise DataError(f"{root}: names no host; write it as {scheme[1]}://HOST/FOLDER")
        return HttpSource(root, access.patience)
    if scheme[1] in SCHEMES:
        return ObjectSource(str(root), access.patience)
    raise DataError(
        f"{root}: {scheme[1]}: is no kind of place that shards are read from; give a folder, or an address that begins "
        f"with http://, https://, s3:// or gs://"
    )
