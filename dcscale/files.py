"""Atomic files and folders: a reader sees the old content or the new one, even if the writer is killed.

The recipe is always the same: write under a temporary name, fsync, rename, fsync the parent folder.
"""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".unfinished-"
"""Prefix of the name of a folder that is being written or removed."""

_MAX_JSON_DEPTH = 100
"""More than any file of ours or of others needs, and far below where Python's recursive functions fail."""
_MAX_DIGITS = 300
"""Of an integer: larger ones overflow where they meet a float."""


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Replaces the content of ``path`` by ``content`` (text as UTF-8) and makes it durable."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replaces the content of ``path`` by ``value`` as indented JSON."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def parse_json(content: str | bytes, source: Path | str, error_type: type[Exception] = ValueError) -> Any:
    """The value of JSON in UTF-8 that anybody may have written.

    Args:
        source: the file, and line if any, for error messages.
        error_type: what is raised.

    Raises:
        ValueError, or another ``error_type``: it is not JSON, is nested too deeply, or has an integer that is too
            large; names ``source`` and the reason.
    """
    try:
        value = json.loads(content if isinstance(content, str) else content.decode(), parse_int=_parse_integer)
    except RecursionError:
        raise error_type(f"{source} cannot be read: it is nested too deeply") from None
    except OverflowError as error:
        raise error_type(f"{source} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{source} cannot be read: it is not UTF-8: {error}") from error
    except ValueError as error:
        raise error_type(f"{source} cannot be read: it is not JSON: {error}") from error
    level = [value]  # all values at the same depth
    for _ in range(_MAX_JSON_DEPTH):
        parts = [part for part in level if isinstance(part, (dict, list))]
        if not parts:
            return value
        level = [item for part in parts for item in (part.values() if isinstance(part, dict) else part)]
    if level:
        raise error_type(f"{source} cannot be read: it is nested too deeply, in more than {_MAX_JSON_DEPTH} levels")
    return value


def _parse_integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise OverflowError(f"the integer {digits[:10]}... has {len(digits)} digits")
    return int(digits)


def read_json(path: Path, error_type: type[Exception] = ValueError) -> dict[str, Any]:
    """The JSON object in a file that anybody may have written.

    Raises:
        ValueError, or another ``error_type``: the file cannot be read, or does not hold a JSON object; names it and
            the reason.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise error_type(f"{path} cannot be read: {error.strerror}") from error
    value = parse_json(content, path, error_type)
    if not isinstance(value, dict):
        raise error_type(f"{path} must be a JSON object, but is a {type(value).__name__}")
    return value


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yields an empty temporary folder that becomes ``target`` on exit, replacing what is there.

    If the body raises, ``target`` stays as it was. Leftovers of a killed process are removed, or moved back, on entry.
    """
    temporary = target.with_name(TEMPORARY_PREFIX + target.name)
    replaced = target.with_name(TEMPORARY_PREFIX + target.name + "-old")
    if replaced.exists() and not target.exists():  # killed between the two renames of publish_folder
        replaced.rename(target)
    for leftover in (temporary, replaced):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        publish_folder(temporary, target, replaced)
        shutil.rmtree(replaced, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(folder: Path, target: Path, replaced: Path) -> None:
    """Renames ``folder`` to ``target`` and makes the rename durable.

    A folder cannot be renamed over another one: an existing ``target`` is first renamed to ``replaced``, and back if
    ``folder`` cannot be renamed. The caller removes ``replaced``. A kill between the renames leaves no ``target``, so
    the caller must look for ``replaced`` when it starts.
    """
    try:
        if target.exists():
            target.rename(replaced)
        folder.rename(target)
    except BaseException:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    sync_folder(target.parent)


def sync_tree(folder: Path) -> None:
    """Makes every file and folder below ``folder`` durable, including files written by other processes."""
    for path in [folder, *folder.rglob("*")]:
        sync_folder(path)


def sync_folder(folder: Path) -> None:
    """Calls fsync: makes renames in a folder durable. Also accepts a file and makes its content durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content as hexadecimal digits; holds 1 MiB of it in memory."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)
    with open(path, "rb", buffering=0) as f:
        while count := f.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


_DISK_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.ENOTCONN, errno.ESHUTDOWN),
    *(errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EREMOTEIO),
}


def may_succeed_later(error: BaseException | None) -> bool:
    """Whether the same work may succeed later, without a change of it.

    The error, or one that it was raised from, is a full, failing or unreachable disk, or is marked with ``retry``.
    """
    while error is not None:
        if getattr(error, "retry", False) or (isinstance(error, OSError) and error.errno in _DISK_ERRORS):
            return True
        error = error.__cause__
    return False


def process_stat(pid: int) -> list[str]:
    """The fields of ``/proc/PID/stat`` of a process on this machine from its state on; empty if it is not known."""
    try:
        # "PID (NAME) STATE PPID ...". NAME may contain anything, also ")".
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:  # no Linux /proc, or no such process
        return []


def exit_with_parent() -> None:
    """Makes this process, which multiprocessing started, exit at once when its parent does, even if that was killed.

    A killed parent cannot stop its workers, which would keep writing to files that the next run may be using.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # not sys.exit, which would end this thread only

    threading.Thread(target=watch, daemon=True).start()
