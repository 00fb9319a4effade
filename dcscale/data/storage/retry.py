"""Retries for failures that may be temporary, such as a busy server, a broken connection or a body that was cut off.

:class:`RemoteStorage` is the base class of all storages outside this machine; their reads are retried.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from dcscale.data.storage.base import ContentError, Storage, UnreadableError, check_size

T = TypeVar("T")

MAX_WAIT = 60.0
"""Longest wait between two attempts in seconds, even if a server asks for more."""

MAX_WRONG_CONTENT = 3
"""Attempts after which wrong content is no longer taken for a transmission error, but for what the storage holds."""

_WARN_AT_ATTEMPT = 3
"""Number of the failed attempt that logs a warning."""

CHECK_THREADS = 8
"""Threads of :meth:`RemoteStorage.check`."""

_CHECK_SAMPLE = 64
"""Largest number of objects that :meth:`RemoteStorage.check` checks."""

_log = logging.getLogger("dcscale.data")


@dataclass(frozen=True)
class RetryPolicy:
    """How long reads from a slow or failing storage are waited for and retried."""

    timeout: float = 30.0
    """Seconds to wait for a connection, and for each next part of a response."""

    backoff: float = 1.0
    """Upper limit in seconds of the random wait before the second attempt; doubles with each further attempt."""

    total: float = 600.0
    """Seconds for all attempts to read an object, waits included."""


class TransientError(Exception):
    """An attempt failed, but another one may succeed.

    Args:
        reason: what happened.
        wait: seconds that the server asked to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Retrier:
    """Repeats failed attempts with exponential backoff and jitter, so that many processes do not retry in step.

    Time is limited per storage and not only per object: once a storage has given no answer for ``policy.total``
    seconds, each further object gets one attempt. A process that skips unreadable shards, and the ranks that wait for
    it, would otherwise be delayed by ``policy.total`` for every object.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self._random = random.Random()  # must not draw from the global generator, whose state belongs to the run
        self._failing_since: float | None = None
        self._cancelled = threading.Event()

    def __reduce__(self) -> tuple[type[Retrier], tuple[RetryPolicy]]:
        return Retrier, (self.policy,)

    def cancel(self) -> None:
        """Make the calls in progress fail instead of retrying; later calls are not affected."""
        self._cancelled.set()
        self._cancelled = threading.Event()

    def run(self, location: str, attempt: Callable[[float], T]) -> T:
        """Call ``attempt(deadline)`` until it succeeds or the time is up.

        Args:
            location: path or address of the object, for messages.
            attempt: one attempt. It must not continue past ``deadline``, a time of :func:`time.monotonic` in seconds.

        Returns:
            The result of the successful attempt.

        Raises:
            UnreadableError: the time is up, or raised by an attempt that failed for good, or :meth:`cancel` was called.
            ContentError: the content was wrong ``MAX_WRONG_CONTENT`` times.
        """
        start, attempts, wrong_content, cancelled = time.monotonic(), 0, 0, self._cancelled
        deadline = min(start, self._failing_since or start) + self.policy.total
        while True:
            attempts += 1
            try:
                # One attempt is always allowed `timeout` seconds, even if the storage's time is already up.
                result = attempt(max(deadline, time.monotonic() + self.policy.timeout))
            except TransientError as error:
                self._failing_since = self._failing_since or time.monotonic()
                reason, requested = str(error), min(error.wait, MAX_WAIT)
            except (ContentError, UnreadableError) as error:
                self._failing_since = None  # the storage did answer
                wrong_content += 1
                if wrong_content == MAX_WRONG_CONTENT or isinstance(error, UnreadableError):
                    raise
                reason, requested = str(error), 0.0
            else:
                self._failing_since = None
                return result
            # Full jitter: wait ~ U(0, min(MAX_WAIT, backoff * 2^(attempts - 1))); 30 keeps the power finite.
            longest = min(MAX_WAIT, self.policy.backoff * 2 ** min(attempts - 1, 30))
            wait = max(requested, self._random.uniform(0, longest))
            now = time.monotonic()
            if now + wait > deadline:
                message = f"{reason}; stopped after {attempts} attempts in {now - start:.0f} s"
                raise UnreadableError(location, message, retry=True)
            if attempts == _WARN_AT_ATTEMPT:
                _log.warning("%s: %s; retrying for up to %.0f s", location, reason, deadline - now)
            if cancelled.wait(wait):
                raise UnreadableError(location, f"{reason}; cancelled after {attempts} attempts")


class RemoteStorage(Storage):
    """A storage outside this machine, read with retries.

    :meth:`check` checks up to 64 evenly spaced objects: checking each of many thousands would take longer than noticing
    a missing one when it is read.

    Args:
        retry_policy: how long reads are retried.
    """

    def __init__(self, retry_policy: RetryPolicy) -> None:
        self.retry_policy = retry_policy
        self._retrier = Retrier(retry_policy)
        self._client: Any = None
        self._client_pid = 0

    def check(self, sizes: Mapping[str, int]) -> None:
        names = list(sizes)
        sample = names[:: max(1, -(-len(names) // _CHECK_SAMPLE))]
        with ThreadPoolExecutor(CHECK_THREADS) as threads:
            for name, found in zip(sample, threads.map(self._size, sample)):
                if found is not None:
                    check_size(self.location(name), found, sizes[name])

    def close(self) -> None:
        self._retrier.cancel()

    @abstractmethod
    def _size(self, name: str) -> int | None:
        """Size of an object in bytes; None if the storage does not report it.

        Raises:
            UnreadableError: the object is missing or cannot be accessed.
        """

    @abstractmethod
    def _connect(self) -> Any:
        """Make the client object that holds the connections."""

    def _connected_client(self) -> Any:
        """The client of this process; a forked process makes its own, since connections cannot be shared."""
        if self._client_pid != os.getpid():
            self._client, self._client_pid = self._connect(), os.getpid()
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_client_pid": 0}
