"""How long to keep trying what may pass by itself: a busy server, a connection that breaks, a body cut short.

:class:`RemoteStorage` is what all places outside this machine, which are read so, have in common.
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

LONGEST_WAIT = 60.0
"""Seconds between two tries, at most, whatever a server asks for."""

WRONG_CONTENT_TRIES = 3
"""Tries after which content that is wrong is taken for what the other side holds, and not for damage on the way."""

_TELL_AT = 3
"""Tries after which a person is told."""

_log = logging.getLogger("dcscale.data")


@dataclass(frozen=True)
class RetryPolicy:
    """What a slow or failing place is granted."""

    timeout: float = 30.0
    """Seconds in which a connection must be made, and in which some byte must arrive."""

    backoff: float = 1.0
    """Seconds before the second try, at most; doubled with each further try."""

    total: float = 600.0
    """Seconds for an object with all tries."""


class TransientError(Exception):
    """A try failed in a way that may pass.

    Args:
        reason: what happened.
        wait: seconds the other side asked to wait.
    """

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class Retries:
    """Tries again, with waits that grow and are drawn at random, so that many processes do not return all at once.

    A place that answers nothing any more is given up for all its objects together: once nothing has come from it for
    ``retry.total`` seconds, each further object gets a single try. So a process that reads on past failures, and
    others that wait for it, are not held up by that time for every object.
    """

    def __init__(self, retry: RetryPolicy) -> None:
        self.retry = retry
        self._chance = random.Random()  # not the module's, whose state belongs to the run
        self._failing_since: float | None = None
        self._ended = threading.Event()

    def __reduce__(self) -> tuple[type[Retries], tuple[RetryPolicy]]:
        return Retries, (self.retry,)

    def end(self) -> None:
        """Let the calls under way try no more; later ones are not affected."""
        self._ended.set()
        self._ended = threading.Event()

    def __call__(self, where: str, attempt: Callable[[float], T]) -> T:
        """``attempt(deadline)``, until it succeeds or the time is over.

        Args:
            where: path or address of the object, for messages.
            attempt: one try, which must not go on past ``deadline`` on the clock of :func:`time.monotonic`.

        Raises:
            UnreadableError: the time is over, or the attempt says that trying again is of no use, or :meth:`end`.
            ContentError: the content was wrong ``WRONG_CONTENT_TRIES`` times.
        """
        start, tries, wrong, ended = time.monotonic(), 0, 0, self._ended
        deadline = min(start, self._failing_since or start) + self.retry.total
        while True:
            tries += 1
            try:
                result = attempt(max(deadline, time.monotonic() + self.retry.timeout))
            except TransientError as error:
                self._failing_since = self._failing_since or time.monotonic()
                reason, asked = str(error), min(error.wait, LONGEST_WAIT)
            except (ContentError, UnreadableError) as error:  # an answer, if not a good one
                self._failing_since = None
                wrong += 1
                if wrong == WRONG_CONTENT_TRIES or isinstance(error, UnreadableError):
                    raise
                reason, asked = str(error), 0.0
            else:
                self._failing_since = None
                return result
            most = min(LONGEST_WAIT, self.retry.backoff * 2 ** min(tries - 1, 30))
            wait = max(asked, self._chance.uniform(0, most))
            now = time.monotonic()
            if now + wait > deadline:
                raise UnreadableError(where, f"{reason}; given up after {tries} tries in {now - start:.0f} s")
            if tries == _TELL_AT:
                _log.warning("%s: %s; trying again for up to %.0f s", where, reason, deadline - now)
            if ended.wait(wait):
                raise UnreadableError(where, f"{reason}; reading was ended after {tries} tries")


_LOOKED_AT = 64
"""Objects, of all that are to be checked."""
AT_ONCE = 8
"""Objects looked at by as many threads."""


class RemoteStorage(Storage):
    """A place outside this machine, read with ``retry``.

    Its check looks at up to 64 objects, evenly spread: looking at each of many thousands takes longer than noticing a
    missing one when its turn comes.
    """

    def __init__(self, retry: RetryPolicy) -> None:
        self.retry = retry
        self._retries = Retries(retry)
        self._client: Any = None
        self._owner = 0

    def check(self, sizes: Mapping[str, int]) -> None:
        names = list(sizes)
        chosen = names[:: max(1, -(-len(names) // _LOOKED_AT))]
        with ThreadPoolExecutor(AT_ONCE) as threads:
            for name, found in zip(chosen, threads.map(self._look, chosen)):
                if found is not None:
                    check_size(self.where(name), found, sizes[name])

    def close(self) -> None:
        self._retries.end()

    @abstractmethod
    def _look(self, name: str) -> int | None:
        """Size of an object, None where the place does not say.

        Raises:
            UnreadableError: it is missing or cannot be looked at.
        """

    @abstractmethod
    def _connect(self) -> Any:
        """What holds the connections."""

    def _connections(self) -> Any:
        """What holds the connections of this process: they must not be shared with a forked one."""
        if self._owner != os.getpid():
            self._client, self._owner = self._connect(), os.getpid()
        return self._client

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_owner": 0}
