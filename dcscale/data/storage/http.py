"""Shards on a web server. The only file that knows requests.

requests is here for what surrounds a download in a cluster and is easily done wrong: proxies and certificates from the
environment, credentials from ``~/.netrc``, redirects that drop them at another host and lead to http and https only.
Trying again is :mod:`our own <dcscale.data.storage.retry>`: libraries retry until the answer begins, not once its body
breaks.
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

from dcscale.data.storage.base import ContentError, UnreadableError, check_content, check_size, shown
from dcscale.data.storage.retry import AT_ONCE, RemoteStorage, RetryPolicy, TransientError

_CHUNK = 1 << 18
"""Bytes of a body read at once."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses that may pass by themselves."""
_GONE = {404, 410}


class HttpStorage(RemoteStorage):
    """A folder of a web server.

    Args:
        root: its address; a query is sent with every request. Messages show neither query nor credentials.
        retry: what the server is granted.
    """

    def __init__(self, root: str, retry: RetryPolicy) -> None:
        super().__init__(retry)
        self._root = urlsplit(root)

    def __str__(self) -> str:
        return shown(urlunsplit(self._root))

    def where(self, name: str) -> str:
        return shown(self._address(name))

    def read(self, name: str, size: int | None = None, sha256: str | None = None) -> bytes:
        where, partial = self.where(name), _Partial()

        def attempt(deadline: float) -> bytes:
            try:
                self._download(self._address(name), where, partial, size, deadline)
                data = partial.buffer.getvalue()
                check_content(where, data, size, sha256)
            except ContentError:
                partial.start_over()
                raise
            return data

        return self._retries(where, attempt)

    def _look(self, name: str) -> int | None:
        where = self.where(name)

        def attempt(_: float) -> int | None:
            with self._answer("HEAD", self._address(name), where, {}) as answer:
                if answer.status_code in (405, 501):  # a server that does not know HEAD
                    return None
                _raise_for_status(where, answer)
                return _length(answer)

        return self._retries(where, attempt)

    def _download(self, address: str, where: str, partial: _Partial, size: int | None, deadline: float) -> None:
        """Fills ``partial``, from where an earlier try left it if the server can tell that the object is the same."""
        with self._answer("GET", address, where, partial.headers()) as answer:
            if answer.status_code == 416:  # it ends where we have come to, or before
                raise ContentError(f"{where}: it has less than the {size} bytes that the manifest says")
            _raise_for_status(where, answer)
            coding = answer.headers.get("Content-Encoding", "identity")
            if coding != "identity":
                raise UnreadableError(where, f"the server sends it with Content-Encoding {coding}; turn that off")
            if answer.status_code != 206 or partial.position != _start_of_range(answer):
                partial.start_over()
                if answer.status_code == 206:
                    raise TransientError("the server sent another range than was asked for")
                length = _length(answer)
                if length is not None:
                    check_size(where, length, size)
                partial.remember(answer)
            while chunk := answer.raw.read1(_CHUNK):
                partial.buffer.write(chunk)
                if size is not None and partial.position > size:
                    check_size(where, partial.position, size)
                if time.monotonic() > deadline:
                    raise TransientError(f"after {partial.position} bytes the time was over")
        if size is not None and partial.position < size:
            partial.ended_short(where, size)

    @contextmanager
    def _answer(self, method: str, address: str, where: str, headers: Mapping[str, str]) -> Iterator[requests.Response]:
        """A server's answer; what goes wrong with it, then or while its body is read, is transient or final."""
        timeout = (self.retry.timeout, self.retry.timeout)
        headers = {"Accept-Encoding": "identity", **headers}
        try:
            with self._connections().request(
                method, address, headers=headers, stream=True, timeout=timeout, allow_redirects=True
            ) as answer:
                if self._root.scheme == "https" and urlsplit(answer.url).scheme != "https":
                    raise UnreadableError(where, "the server leads from https to http; give the address it leads to")
                yield answer
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            raise UnreadableError(where, "the server leads to an address that is neither http nor https") from error
        except requests.exceptions.TooManyRedirects as error:
            raise UnreadableError(where, "the server leads from address to address without end") from error
        except (requests.exceptions.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            chain = _chain(error)
            if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in chain):
                reason = "its certificate is not trusted; name the authority's file in REQUESTS_CA_BUNDLE"
                raise UnreadableError(where, reason) from error
            raise TransientError(_in_words(chain, self.retry.timeout)) from error

    def _connect(self) -> requests.Session:
        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=2 * AT_ONCE))
        return session

    def _address(self, name: str) -> str:
        return urlunsplit(self._root._replace(path=f"{self._root.path.rstrip('/')}/{name}", fragment=""))


class _Partial:
    """What has arrived of an object, and what shows the server that it is still the same."""

    def __init__(self) -> None:
        self.buffer = io.BytesIO()
        self._validator: str | None = None
        self._ended_at: int | None = None

    @property
    def position(self) -> int:
        return self.buffer.tell()

    def start_over(self) -> None:
        self.buffer.seek(0)
        self.buffer.truncate()

    def remember(self, answer: requests.Response) -> None:
        tag = answer.headers.get("ETag", "")
        self._validator = tag if tag.startswith('"') else answer.headers.get("Last-Modified")

    def headers(self) -> dict[str, str]:
        """What to ask for: the rest if it is the same object, else all of it."""
        if not self.position or not self._validator:
            return {}
        return {"Range": f"bytes={self.position}-", "If-Range": self._validator}

    def ended_short(self, where: str, size: int) -> NoReturn:
        """A body without a length has ended: cut off, the first time; where it does so again, that is its end."""
        if self._ended_at == self.position:
            check_size(where, self.position, size)
        self._ended_at = self.position
        raise TransientError(f"it ended after {self.position} of {size} bytes")


def _raise_for_status(where: str, answer: requests.Response) -> None:
    status = answer.status_code
    if status in (200, 206):
        return
    said = f"the server answers {status} {answer.reason}"
    if status in _PASSING:
        raise TransientError(said, urllib3.Retry().get_retry_after(answer.raw) or 0.0)
    if status in (401, 403, 407):
        said += "; give it credentials, as in ~/.netrc"
    raise UnreadableError(where, said, missing=status in _GONE)


def _length(answer: requests.Response) -> int | None:
    """Bytes of the body as the server states them, if it does."""
    length = answer.headers.get("Content-Length", "")
    return int(length) if length.isdecimal() and "Content-Encoding" not in answer.headers else None


def _start_of_range(answer: requests.Response) -> int | None:
    found = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def _chain(error: BaseException | None) -> list[BaseException]:
    chain = []
    while error is not None:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _in_words(chain: list[BaseException], timeout: float) -> str:
    """What went wrong, without the address, which may hold secrets."""
    for error in chain:
        if isinstance(error, requests.exceptions.ConnectTimeout):
            return f"no connection within {timeout:g} s"
        if isinstance(error, (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError)):
            return f"nothing arrived for {timeout:g} s"
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
    return f"the connection broke ({type(chain[-1]).__name__})"
