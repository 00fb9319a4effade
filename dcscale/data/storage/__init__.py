"""Where shards lie: a folder, a web server, an object store.

A :class:`Storage` is a root and the objects below it, by their name relative to it. Objects are read as a whole and
checked against their manifest before anyone sees a byte. Names come from a manifest, whose rules keep them inside their
root; nothing here starts a process or a shell.
"""

from dcscale.data.storage.base import ContentError, Storage, UnreadableError, shown
from dcscale.data.storage.local import LocalStorage
from dcscale.data.storage.open import StorageOptions, UnionStorage, open_storage
from dcscale.data.storage.retry import RetryPolicy

__all__ = [
    "ContentError",
    "LocalStorage",
    "RetryPolicy",
    "Storage",
    "StorageOptions",
    "UnionStorage",
    "UnreadableError",
    "open_storage",
    "shown",
]
