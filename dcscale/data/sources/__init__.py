"""Where shards lie: a folder, a web server, an object store.

A :class:`Source` is a root and the objects below it, by their name relative to it. Objects are read as a whole and
checked against their manifest before anyone sees a byte. Names come from a manifest, whose rules keep them inside their
root; nothing here starts a process or a shell.
"""

from dcscale.data.sources.base import ContentError, Source, UnreadableError
from dcscale.data.sources.folder import FolderSource
from dcscale.data.sources.joined import JoinedSource
from dcscale.data.sources.open import Access, open_source
from dcscale.data.sources.patterns import shown
from dcscale.data.sources.retry import Patience

__all__ = [
    "Access",
    "ContentError",
    "FolderSource",
    "JoinedSource",
    "Patience",
    "Source",
    "UnreadableError",
    "open_source",
    "shown",
]
