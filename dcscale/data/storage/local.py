"""Shards in a folder of this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcscale.data.errors import DataError
from dcscale.data.storage.base import Storage, UnreadableError, check_content, check_size


class LocalStorage(Storage):
    """A folder of this machine.

    Args:
        folder: path of the folder.

    Raises:
        DataError: the folder does not exist or cannot be accessed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            exists = folder.is_dir()
        except OSError as error:
            raise DataError(f"{folder}: cannot be accessed: {error.strerror}; give an accessible folder") from error
        if not exists:
            raise DataError(f"{folder}: no such folder; give a folder of shards, as tools/make_shards.py writes it")

    def __str__(self) -> str:
        return str(self.folder)

    def location(self, name: str) -> str:
        return str(self.folder / name)

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise self._unreadable(name, error) from error
        check_content(self.location(name), data, size, sha256)
        return data

    def check(self, sizes: Mapping[str, int]) -> None:
        for name, size in sizes.items():
            try:
                found = (self.folder / name).stat().st_size
            except OSError as error:
                raise self._unreadable(name, error) from error
            check_size(self.location(name), found, size)

    def close(self) -> None:
        """Do nothing: reads of local files are not retried."""

    def _unreadable(self, name: str, error: OSError) -> UnreadableError:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return UnreadableError(self.location(name), error.strerror or str(error), missing=missing)
