"""Files that are never half-written: a reader sees the old content or the new, whatever dies when."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replaces what ``path`` holds by ``content`` (text as UTF-8) and makes it durable."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces ``path`` by ``value`` as indented JSON."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def sync_tree(folder: Path) -> None:
    """Makes every file and folder below ``folder`` durable, whoever wrote it."""
    for path in [folder, *folder.rglob("*")]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Makes renames in ``folder`` durable; or the content of a file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal digits; reads it piece by piece."""
    digest, piece = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(piece):
            digest.update(memoryview(piece)[:count])
    return digest.hexdigest()
