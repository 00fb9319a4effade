"""Shards in an object store: Amazon's S3 and what speaks its protocol, and Google Cloud Storage.

Read through fsspec, by its implementations s3fs and gcsfs, which are optional. Credentials, endpoints and the like
come from where the vendors' own tools take them (environment, files in the home folder, the machine's role), or from
fsspec's ``FSSPEC_S3_...`` variables; ``FSSPEC_S3_ANON=true`` reads public buckets without any.
"""

from __future__ import annotations

import errno
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dcscale.data.errors import DataError
from dcscale.data.storage.base import ContentError, UnreadableError, check_content, check_size
from dcscale.data.storage.retry import RemoteStorage, RetryPolicy, TransientError

SCHEMES = {"s3": "s3", "gs": "gs"}
"""Scheme of an address -> extra of this package that installs what reads it."""

_PART = 1 << 24
"""Bytes asked for at once, and so the most that is asked for again after a failure."""

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
"""Errors of libraries that are not imported here."""


class ObjectStorage(RemoteStorage):
    """A prefix of a bucket.

    Args:
        root: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.
        retry: what the store is granted.

    Raises:
        DataError: what reads it is not installed, or ``root`` names no bucket.
    """

    def __init__(self, root: str, retry: RetryPolicy) -> None:
        super().__init__(retry)
        self._scheme, slashes, self._path = root[:2], root[2:5], root[5:].rstrip("/")
        if slashes != "://" or not self._path.partition("/")[0] or "@" in self._path.partition("/")[0]:
            raise DataError(
                f"{self._scheme}://...: must be written as {self._scheme}://BUCKET/PREFIX, without credentials, which "
                f"come from the environment"
            )
        self._kind = _implementation(self._scheme)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def where(self, name: str) -> str:
        return f"{self}/{name}"

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        where, buffer = self.where(name), io.BytesIO()

        def attempt(deadline: float) -> bytes:
            try:
                self._download(f"{self._path}/{name}", where, buffer, size, deadline)
                data = buffer.getvalue()
                check_content(where, data, size, sha256)
            except ContentError:
                buffer.seek(0)
                buffer.truncate()
                raise
            return data

        return self._retries(where, attempt)

    def _download(self, path: str, where: str, buffer: io.BytesIO, size: int | None, deadline: float) -> None:
        """Fills ``buffer`` from where an earlier try left it, in parts, up to one byte more than there should be."""
        while size is None or buffer.tell() <= size:
            start = buffer.tell()
            stop = None if size is None else start + _PART if start + _PART < size else size + 1
            limits = {} if stop is None else {"start": start, "end": stop}
            with self._errors(where):
                try:
                    part = self._connections().cat_file(path, **limits, timeout=_left(deadline))
                except OSError as error:
                    if error.errno == errno.EINVAL and stop is not None:  # so an object is refused that ends before
                        check_size(where, self._connections().info(path, timeout=_left(deadline))["size"], size)
                    raise
            buffer.write(part)
            if stop is None or len(part) < stop - start:
                return

    def _look(self, name: str) -> int | None:
        where = self.where(name)

        def attempt(deadline: float) -> int | None:
            with self._errors(where):
                return self._connections().info(f"{self._path}/{name}", timeout=_left(deadline))["size"]

        return self._retries(where, attempt)

    def glob(self) -> list[str]:
        """Addresses of the folders that match this one's address, a pattern with ``*``, ``?`` or ``[...]``."""

        def attempt(deadline: float) -> list[str]:
            with self._errors(str(self)):
                found = self._connections().glob(self._path, detail=True, timeout=_left(deadline))
            return [f"{self._scheme}://{path}" for path, about in found.items() if about["type"] == "directory"]

        return self._retries(str(self), attempt)

    def _connect(self) -> Any:
        from fsspec.config import conf  # here, since local runs need nothing of it

        options: dict[str, Any] = {}
        if self._scheme == "s3":
            limits = {"connect_timeout": self.retry.timeout, "read_timeout": self.retry.timeout}
            options["config_kwargs"] = {**conf.get("s3", {}).get("config_kwargs", {}), **limits}
        return self._kind(skip_instance_cache=True, use_listings_cache=False, **options)

    @contextmanager
    def _errors(self, where: str) -> Iterator[None]:
        """Sorts what the libraries raise: they translate what is final, and let anything else through as it came."""
        try:
            yield
        except DataError:
            raise
        except FileNotFoundError as error:
            raise UnreadableError(where, "there is no such object", missing=True) from error
        except PermissionError as error:
            raise UnreadableError(where, f"the store refuses it: {error}; check the credentials") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if type(error).__name__ in _NO_CREDENTIALS:
                fix = "give some in the environment; FSSPEC_S3_ANON=true reads public buckets without"
                raise UnreadableError(where, f"{reason}; {fix}") from error
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                raise UnreadableError(where, f"the store does not understand the request: {error}") from error
            raise TransientError(reason) from error


def _left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _implementation(scheme: str) -> Any:
    from fsspec import get_filesystem_class  # here, since local runs need nothing of it

    try:
        return get_filesystem_class(scheme)
    except ImportError as error:
        raise DataError(
            f"{scheme}://: reading it needs packages that are not installed ({error}); install them with "
            f"'pip install dcscale[{SCHEMES[scheme]}]'"
        ) from error
