"""Heartbeats of the ranks, and the alarm, through the run's store. Every call may block as long as the store does."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from dcscale.cluster.verdict import Answer, Status, Verdict
from dcscale.files import parse_json

ALARM, VERDICT = "alarm", "verdict"


@dataclass(frozen=True)
class Alarm:
    """A rank suspects a hang and asks all ranks what they do."""

    by: int
    """The rank that asks; it also judges."""

    folder: str
    """Name of the folder below ``RUN/hangs`` for the files of all ranks."""

    silent: dict[int, float]
    """Seconds since the last heartbeat, for each rank that has missed several."""

    over: list[int]
    """Ranks that are in their phase for longer than its limit."""

    missing: list[Status]
    """The last status of each of these."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Alarm:
        silent = {int(rank): seconds for rank, seconds in value["silent"].items()}
        return cls(**{**value, "silent": silent, "missing": [Status(**status) for status in value["missing"]]})


class Heartbeats:
    """What this rank says to the others, and what it knows of them. For one thread; others may read the attributes.

    Args:
        rank: this rank.
        hosts: the host of each rank.
        open_store: makes a client of the store; raises torch.distributed.DistError if it does not answer.
        now: seconds of a clock that does not run while this process is stopped.
    """

    def __init__(self, rank: int, hosts: Sequence[str], open_store: Callable[[], dist.Store], now: Callable[[], float]):
        self.rank, self._open_store, self._now = rank, open_store, now
        self._store: dist.Store | None = None
        self._latest: dict[int, bytes] = {}
        self.statuses = {rank: Status(rank, host, 0, "", 0, "start", 0.0, {}) for rank, host in enumerate(hosts)}
        self.changed = dict.fromkeys(self.statuses, now())
        """When the heartbeat of each rank was last seen to change."""
        self.contact = now()
        """When the store last answered."""
        self._beats = 0

    def silent(self, rank: int) -> float:
        """Seconds since the last heartbeat of a rank."""
        return self._now() - self.changed[rank]

    def beat(self, own: Status, all_ranks: bool) -> None:
        """Sends a heartbeat, and reads those of all ranks, or only that of rank 0.

        Raises:
            torch.distributed.DistError: the store does not answer; the next call connects again.
        """
        self._beats += 1
        self._set(f"beat/{self.rank}", {"number": self._beats, "status": asdict(own)})
        wanted = [rank for rank in (self.statuses if all_ranks else [0]) if rank != self.rank]
        there = [rank for rank in wanted if rank in self._latest or self._call("check", [f"beat/{rank}"])]
        for rank, beat in zip(there, self._call("multi_get", [f"beat/{rank}" for rank in there]) if there else []):
            if beat != self._latest.get(rank):
                self._latest[rank], self.changed[rank] = beat, self._now()
                self.statuses[rank] = Status(**parse_json(beat, f"the heartbeat of rank {rank}")["status"])
        self.statuses[self.rank] = own
        self.changed[self.rank] = self.contact = self._now()

    def alarm(self) -> Alarm | None:
        """The alarm, if there is one. Raises DistError as :meth:`beat`."""
        value = self._get(ALARM)
        return None if value is None else Alarm.from_json(value)

    def raise_alarm(self, alarm: Alarm) -> Alarm:
        """Asks all ranks what they do; returns the alarm that was raised first. Raises DistError as :meth:`beat`."""
        first = self._call("compare_set", ALARM, "", json.dumps(asdict(alarm)))
        return Alarm.from_json(parse_json(first, ALARM))

    def answer(self, answer: Answer) -> None:
        """Answers an alarm. Raises DistError as :meth:`beat`."""
        self._set(f"answer/{self.rank}", answer.to_json())

    def answers(self, known: dict[int, Answer]) -> dict[int, Answer]:
        """``known`` with the answers that have arrived since. Raises DistError as :meth:`beat`."""
        new = {rank: self._get(f"answer/{rank}") for rank in self.statuses if rank not in known}
        return known | {rank: Answer.from_json(value) for rank, value in new.items() if value is not None}

    def conclude(self, verdict: Verdict) -> None:
        """Tells all ranks how the alarm was judged. Raises DistError as :meth:`beat`."""
        self._set(VERDICT, asdict(verdict))

    def verdict(self) -> Verdict | None:
        """How the alarm was judged, once it was. Raises DistError as :meth:`beat`."""
        value = self._get(VERDICT)
        return None if value is None else Verdict(**value)

    def _get(self, key: str) -> Any:
        return parse_json(self._call("get", key), key) if self._call("check", [key]) else None

    def _set(self, key: str, value: Any) -> None:
        self._call("set", key, json.dumps(value))

    def _call(self, method: str, *arguments: Any) -> Any:
        """A method of the store; connects first where that is necessary."""
        try:
            if self._store is None:
                self._store = self._open_store()
            return getattr(self._store, method)(*arguments)
        except dist.DistError:
            self._store = None
            raise
