"""Storage of shards: a local folder, a web server or an object store.

A :class:`Storage` is a root and the objects below it, named by their path relative to it. An object is read in full and
checked against its manifest before any of its bytes are used. Names come from a manifest, whose rules keep them inside
the root; nothing here starts a process or a shell.
"""

from dcscale.data.storage.base import ContentError, Storage, UnreadableError, redact
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
    "redact",
]
