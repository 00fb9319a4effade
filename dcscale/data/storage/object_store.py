"""Shards in an object store: Amazon S3 and stores with the same protocol, and Google Cloud Storage.

Objects are read with fsspec through its optional implementations s3fs and gcsfs. Credentials, endpoints and the like
are taken from the same places as by the vendors' own tools (environment, files in the home folder, the machine's role),
or from fsspec's ``FSSPEC_S3_...`` variables; ``FSSPEC_S3_ANON=true`` reads public buckets without credentials.
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
"""Scheme of an address -> extra of this package that installs its fsspec implementation."""

PART_BYTES = 1 << 24
"""Default size of one request."""

_NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError"}
"""Class names of errors, since the libraries that define them are not imported here."""


class ObjectStorage(RemoteStorage):
    """A prefix of a bucket.

    Args:
        root: ``s3://BUCKET/PREFIX`` or ``gs://BUCKET/PREFIX``.
        retry_policy: how long reads are retried.
        part_bytes: bytes of one request; after a failure at most this much is requested again.

    Raises:
        DataError: the fsspec implementation is not installed, or ``root`` names no bucket.
    """

    def __init__(self, root: str, retry_policy: RetryPolicy, *, part_bytes: int = PART_BYTES) -> None:
        super().__init__(retry_policy)
        self._part_bytes = part_bytes
        self._scheme, slashes, self._path = root[:2], root[2:5], root[5:].rstrip("/")
        bucket = self._path.partition("/")[0]
        if slashes != "://" or not bucket or "@" in bucket:
            raise DataError(
                f"{self._scheme}://...: must be written as {self._scheme}://BUCKET/PREFIX, without credentials, which "
                f"come from the environment"
            )
        self._filesystem_class = _filesystem_class(self._scheme)

    def __str__(self) -> str:
        return f"{self._scheme}://{self._path}"

    def location(self, name: str) -> str:
        return f"{self}/{name}"

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        location, buffer = self.location(name), io.BytesIO()

        def attempt(deadline: float) -> bytes:
            try:
                self._download(f"{self._path}/{name}", location, buffer, size, deadline)
                data = buffer.getvalue()
                check_content(location, data, size, sha256)
            except ContentError:
                buffer.seek(0)
                buffer.truncate()
                raise
            return data

        return self._retrier.run(location, attempt)

    def _download(self, path: str, location: str, buffer: io.BytesIO, size: int | None, deadline: float) -> None:
        """Fill ``buffer`` part by part, from where the last attempt stopped.

        One byte more than ``size`` is requested, so that an object that is too long is noticed.
        """
        while size is None or buffer.tell() <= size:
            start = buffer.tell()
            end = start + self._part_bytes
            stop = None if size is None else end if end < size else size + 1
            limits = {} if stop is None else {"start": start, "end": stop}
            with self._mapped_errors(location):
                try:
                    part = self._connected_client().cat_file(path, **limits, timeout=_seconds_left(deadline))
                except OSError as error:
                    if error.errno == errno.EINVAL and stop is not None:  # the range begins at or after the end
                        found = self._connected_client().info(path, timeout=_seconds_left(deadline))["size"]
                        check_size(location, found, size)
                    raise
            buffer.write(part)
            if stop is None or len(part) < stop - start:  # the end of the object
                return

    def _size(self, name: str) -> int | None:
        location = self.location(name)

        def attempt(deadline: float) -> int | None:
            with self._mapped_errors(location):
                return self._connected_client().info(f"{self._path}/{name}", timeout=_seconds_left(deadline))["size"]

        return self._retrier.run(location, attempt)

    def glob(self) -> list[str]:
        """Addresses of the folders that match this root, which is a pattern with ``*``, ``?`` or ``[...]``."""

        def attempt(deadline: float) -> list[str]:
            with self._mapped_errors(str(self)):
                found = self._connected_client().glob(self._path, detail=True, timeout=_seconds_left(deadline))
            return [f"{self._scheme}://{path}" for path, info in found.items() if info["type"] == "directory"]

        return self._retrier.run(str(self), attempt)

    def _connect(self) -> Any:
        from fsspec.config import conf  # imported here, because local runs do not need fsspec

        options: dict[str, Any] = {}
        if self._scheme == "s3":
            limits = {"connect_timeout": self.retry_policy.timeout, "read_timeout": self.retry_policy.timeout}
            options["config_kwargs"] = {**conf.get("s3", {}).get("config_kwargs", {}), **limits}
        # fsspec would otherwise return the same instance, with stale listings, to several storages.
        return self._filesystem_class(skip_instance_cache=True, use_listings_cache=False, **options)

    @contextmanager
    def _mapped_errors(self, location: str) -> Iterator[None]:
        """Map the libraries' errors: those that they translate to built-in types are final, all others transient."""
        try:
            yield
        except DataError:
            raise
        except FileNotFoundError as error:
            raise UnreadableError(location, "no such object", missing=True) from error
        except PermissionError as error:
            raise UnreadableError(location, f"the store denies access: {error}; check the credentials") from error
        except Exception as error:
            reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if type(error).__name__ in _NO_CREDENTIALS:
                fix = "set them in the environment; FSSPEC_S3_ANON=true reads public buckets without"
                raise UnreadableError(location, f"{reason}; {fix}") from error
            if isinstance(error, OSError) and error.errno == errno.EINVAL:
                raise UnreadableError(location, f"the store rejects the request as invalid: {error}") from error
            raise TransientError(reason) from error


def _seconds_left(deadline: float) -> float:
    return max(deadline - time.monotonic(), 0.001)


def _filesystem_class(scheme: str) -> Any:
    from fsspec import get_filesystem_class  # imported here, because local runs do not need fsspec

    try:
        return get_filesystem_class(scheme)
    except ImportError as error:
        raise DataError(
            f"{scheme}://: reading it needs packages that are not installed ({error}); install them with "
            f"'pip install dcscale[{SCHEMES[scheme]}]'"
        ) from error
