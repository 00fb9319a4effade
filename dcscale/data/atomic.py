"""Writing a file so that its name never stands for half of it."""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes | memoryview) -> None:
    """Write ``data`` under ``path``: into a temporary neighbour first, synced to disk, then renamed over it.

    A crash leaves the old file or the new one, and at worst a hidden ``.NAME.PID.tmp`` beside it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the renames inside ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
