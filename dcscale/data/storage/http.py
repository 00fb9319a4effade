"""Shards on a web server. The only file that imports requests.

requests handles what is easily done wrong around a download in a cluster: proxies and certificates from the
environment, credentials from ``~/.netrc``, and redirects, which drop credentials at another host and are limited to
http and https. Retries come from :mod:`dcscale.data.storage.retry`, because HTTP libraries retry only until the
response begins, not when its body breaks off.
"""

from __future__ import annotations

import io
import re
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn
from urllib.parse import urlsplit, urlunsplit

import requests
import urllib3

from dcscale.data.storage.base import ContentError, UnreadableError, check_content, check_size, redact
from dcscale.data.storage.retry import CHECK_THREADS, RemoteStorage, RetryPolicy, TransientError

_CHUNK = 1 << 18
"""Largest number of bytes of a body that are read at once."""

_TRANSIENT_STATUSES = {408, 425, 429, 500, 502, 503, 504}
_MISSING_STATUSES = {404, 410}


class HttpStorage(RemoteStorage):
    """A folder of a web server.

    Args:
        root: its address; a query is sent with every request. Messages show neither query nor credentials.
        retry_policy: how long reads are retried.
    """

    def __init__(self, root: str, retry_policy: RetryPolicy) -> None:
        super().__init__(retry_policy)
        self._root = urlsplit(root)

    def __str__(self) -> str:
        return redact(urlunsplit(self._root))

    def location(self, name: str) -> str:
        return redact(self._url(name))

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        location, partial = self.location(name), _PartialDownload()

        def attempt(deadline: float) -> bytes:
            try:
                self._download(self._url(name), location, partial, size, deadline)
                data = partial.buffer.getvalue()
                check_content(location, data, size, sha256)
            except ContentError:
                partial.clear()
                raise
            return data

        return self._retrier.run(location, attempt)

    def _size(self, name: str) -> int | None:
        location = self.location(name)

        def attempt(_: float) -> int | None:
            with self._response("HEAD", self._url(name), location, {}) as response:
                if response.status_code in (405, 501):  # the server does not support HEAD
                    return None
                _raise_for_status(location, response)
                return _content_length(response)

        return self._retrier.run(location, attempt)

    def _download(self, url: str, location: str, partial: _PartialDownload, size: int | None, deadline: float) -> None:
        """Fill ``partial``; continue after the last attempt's bytes if the server confirms the same object."""
        with self._response("GET", url, location, partial.request_headers()) as response:
            if response.status_code == 416:  # the requested range begins at or after the end of the object
                raise ContentError(f"{location}: it has less than the {size} bytes that the manifest says")
            _raise_for_status(location, response)
            coding = response.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                raise UnreadableError(location, f"the server sends it with Content-Encoding {coding}; turn that off")
            if response.status_code != 206 or partial.position != _range_start(response):
                # A 200 response is the full object: the first attempt, a changed object, or a server without ranges.
                partial.clear()
                if response.status_code == 206:
                    raise TransientError("the server sent another range than requested")
                length = _content_length(response)
                if length is not None:
                    check_size(location, length, size)
                partial.remember_validator(response)
            while chunk := response.raw.read1(_CHUNK):
                partial.buffer.write(chunk)
                if size is not None and partial.position > size:
                    check_size(location, partial.position, size)
                if time.monotonic() > deadline:
                    raise TransientError(f"after {partial.position} bytes the time was up")
        if size is not None and partial.position < size:
            partial.raise_short(location, size)

    @contextmanager
    def _response(
        self, method: str, url: str, location: str, headers: Mapping[str, str]
    ) -> Iterator[requests.Response]:
        """A server's response; maps errors, also those while the body is read, to TransientError or UnreadableError."""
        timeout = (self.retry_policy.timeout, self.retry_policy.timeout)
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            with self._connected_client().request(
                method, url, headers=headers, stream=True, timeout=timeout, allow_redirects=True
            ) as response:
                if self._root.scheme == "https" and urlsplit(response.url).scheme != "https":
                    raise UnreadableError(
                        location, "the server redirects from https to http; give the address it redirects to"
                    )
                yield response
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            reason = "the server redirects to an address that is neither http nor https"
            raise UnreadableError(location, reason) from error
        except requests.exceptions.TooManyRedirects as error:
            raise UnreadableError(location, "the server redirects too many times") from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            chain = _exception_chain(error)
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
                reason = "its certificate is not trusted; name the authority's file in REQUESTS_CA_BUNDLE"
                raise UnreadableError(location, reason) from error
            raise TransientError(_describe(chain, self.retry_policy.timeout)) from error

    def _connect(self) -> requests.Session:
        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=2 * CHECK_THREADS))
        return session

    def _url(self, name: str) -> str:
        return urlunsplit(self._root._replace(path=f"{self._root.path.rstrip('/')}/{name}", fragment=""))


class _PartialDownload:
    """The bytes of an object received so far, and the validator that identifies this version of the object."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self._validator: str | None = None
        self._ended_at: int | None = None

    @property
    def position(self) -> int:
        return self.buffer.tell()

    def clear(self) -> None:
        self.buffer.seek(0)
        self.buffer.truncate()

    def remember_validator(self, response: requests.Response) -> None:
        tag = response.headers.get("ETag", "")
        # If-Range needs a strong entity tag; weak ones begin with W/.
        self._validator = tag if tag.startswith('"') else response.headers.get("Last-Modified")

    def request_headers(self) -> dict[str, str]:
        """Headers that ask for the rest if the object is unchanged, else for all of it."""
        if not self.position or not self._validator:
            return {}
        return {"Range": f"bytes={self.position}-", "If-Range": self._validator}

    def raise_short(self, location: str, size: int) -> NoReturn:
        """Raise the error of a body without a length that ended early.

        The first time it is taken for a broken connection; ending again at the same byte is the end of the object.
        """
        if self._ended_at == self.position:
            check_size(location, self.position, size)
        self._ended_at = self.position
        raise TransientError(f"it ended after {self.position} of {size} bytes")


def _raise_for_status(location: str, response: requests.Response) -> None:
    status = response.status_code
    if status in (200, 206):
        return
    reason = f"the server answers {status} {response.reason}"
    if status in _TRANSIENT_STATUSES:
        raise TransientError(reason, urllib3.Retry().get_retry_after(response.raw) or 0.0)
    if status in (401, 403, 407):
        reason += "; give it credentials, as in ~/.netrc"
    raise UnreadableError(location, reason, missing=status in _MISSING_STATUSES)


def _content_length(response: requests.Response) -> int | None:
    """Bytes of the body according to the server; None if it does not state them."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and "Content-Encoding" not in response.headers else None


def _range_start(response: requests.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _exception_chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _describe(chain: list[BaseException], timeout: float) -> str:
    """What went wrong, without the exceptions' own messages: they contain the address, which may hold secrets."""
    for error in chain:
        if isinstance(error, requests.exceptions.ConnectTimeout):
            return f"no connection within {timeout:g} s"
        if isinstance(error, (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError)):
            return f"no data arrived for {timeout:g} s"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
    return f"the connection broke ({type(chain[-1]).__name__})"
