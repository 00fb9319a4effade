"""The ranks of a job talk through its store, so that one that is lost is named, and keeps no other waiting for long.

Collectives cannot do that: with a dead link or rank they hang, or end without saying who is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch.distributed import DistError

from dcscale.parallel.environment import Environment
from dcscale.parallel.rendezvous import Clock, Rendezvous, appears

T = TypeVar("T")


class LostRanksError(RuntimeError):
    """Ranks did not answer.

    Args:
        message: says after what time.
        ranks: which; rank 0 if the store is gone.
    """

    def __init__(self, message: str, ranks: Sequence[int]):
        super().__init__(message)
        self.ranks = list(ranks)


class Meeting:
    """Exchanges between all ranks, each with a time limit.

    Args:
        rendezvous: where the ranks have met.
        environment: this process.
    """

    def __init__(self, rendezvous: Rendezvous, environment: Environment):
        self._store, self.hosts = rendezvous.store, rendezvous.hosts
        self.rank, self.ranks = environment.rank, environment.world_size
        self._count = 0

    def exchange(
        self,
        what: str,
        value: Any = None,
        answer: Callable[[list[Any]], T] = lambda values: None,
        seconds: float = 60.0,
    ) -> T:
        """Gives ``value`` to rank 0; returns on all ranks what rank 0 makes of the values of all.

        All ranks call it together, in the same order.

        Args:
            what: the work that is done now, for messages.
            value: JSON.
            answer: from the values by rank to JSON; called on rank 0 only.
            seconds: that rank 0 waits for all others, and they for its answer besides.

        Raises:
            LostRanksError: on all ranks that are left, if one has not answered in time.
        """
        self._count += 1
        key = f"doctor/{self._count}"
        try:
            if self.rank == 0:
                return self._lead(key, what, value, answer, seconds)
            self._store.set(f"{key}/{self.rank}", json.dumps(value))
            # Rank 0 may have begun to wait later than this rank, by as long as others take.
            if not appears(self._store, key, Clock(2 * seconds + 10)):
                raise LostRanksError(f"rank 0 has not answered ({what}) after {2 * seconds + 10:g} s", [0])
            found = json.loads(self._store.get(key))
        except DistError:
            raise LostRanksError(f"rank 0, which serves the store, was lost ({what})", [0]) from None
        self._store.add(f"{key}/readers", 1)
        if found["lost"]:
            raise LostRanksError(found["message"], found["lost"])
        return found["answer"]

    def _lead(self, key: str, what: str, value: Any, answer: Callable[[list[Any]], T], seconds: float) -> T:
        clock, others = Clock(seconds), range(1, self.ranks)
        lost = [rank for rank in others if not appears(self._store, f"{key}/{rank}", clock)]
        if lost:
            message = f"no answer within {seconds:g} s ({what})"
            self._store.set(key, json.dumps({"lost": lost, "message": message}))
            self._let_read(key, self.ranks - 1 - len(lost))
            raise LostRanksError(message, lost)
        texts = self._store.multi_get([f"{key}/{rank}" for rank in others])
        found = answer([value, *map(json.loads, texts)])
        text = json.dumps({"lost": [], "answer": found})
        self._store.set(key, text)
        return json.loads(text)["answer"]  # as the others get it: keys of dicts are texts

    def end(self) -> None:
        """Keeps rank 0, and so the store, until all others have read its last answer, for some seconds at most."""
        if self.rank == 0:
            self._let_read(f"doctor/{self._count}", self.ranks - 1)

    def _let_read(self, key: str, readers: int, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while self._store.add(f"{key}/readers", 0) < readers and time.monotonic() < deadline:
            time.sleep(0.02)
