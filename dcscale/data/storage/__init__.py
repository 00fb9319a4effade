"""Where shards lie: a folder, a web server, an object store.

A :class:`Source` is a root and the objects below it, by their name relative to it. Objects are read as a whole and
checked against their manifest before anyone sees a byte. Names come from a manifest, whose rules keep them inside their
root; nothing here starts a process or a shell.
"""

from dcscale.data.storage.base import ContentError, Source, UnreadableError, shown
from dcscale.data.storage.local import FolderSource
from dcscale.data.storage.open import Access, JoinedSource, open_source
from dcscale.data.storage.retry import Patience

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
