"""What all places outside this machine have in common."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from dcscale.data.sources.base import Source, check_size
from dcscale.data.sources.retry import Patience, Retries

_LOOKED_AT = 64
"""Objects, of all that are to be checked."""
AT_ONCE = 8
"""Objects looked at by as many threads."""


class RemoteSource(Source):
    """A place outside this machine, read with ``patience``.

    Its check looks at up to 64 objects, evenly spread: looking at each of many thousands takes longer than noticing a
    missing one when its turn comes.
    """

    def __init__(self, patience: Patience) -> None:
        self.patience = patience
        self._retries = Retries(patience)
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
