"""When something counts as a hang, and the clock that says how long it took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dcscale.config import ParallelConfig

MARGIN_SECONDS = 20.0
"""That process groups wait longer than the watchdog, so that it is the one that ends a hang and names the rank."""


@dataclass(frozen=True)
class Limits:
    """Seconds after which something counts as a hang."""

    start: float
    """Until the first step begins, and for that step."""

    step: float | None
    """For any other step; None: ten times the median of the last 64, at least 30."""

    pause: float
    """For everything else: data, validation, samples, saving."""

    lost: float = 30.0
    """Without a heartbeat. Before the first step is done four times as long: loading a library may hold the lock."""

    beat: float = 2.0
    """Between two heartbeats."""

    answer: float = 5.0
    """For answering an alarm, besides a heartbeat."""

    @classmethod
    def from_config(cls, config: ParallelConfig, world_size: int) -> Limits:
        """The limits of a run."""
        beat = max(2.0, world_size / 200)  # rank 0 reads the heartbeats of 1000 ranks in about 10 ms
        lost = 30.0 if config.hang_seconds is None else min(30.0, config.hang_seconds)
        return cls(
            start=60 * config.start_timeout_minutes,
            step=config.hang_seconds,
            pause=60 * config.pause_timeout_minutes,
            lost=max(lost, 5 * beat),
            beat=beat,
        )

    def of_step(self, seconds: Sequence[float]) -> float:
        """Longest time that the next step may take.

        Args:
            seconds: of the last 64 steps of this process, oldest first. The first step compiles and allocates; so the
                oldest counts only while it is the only one.
        """
        if not seconds:
            return self.start
        if self.step is not None:
            return self.step
        # Whole seconds, since each change costs a call for each process group.
        return max(30.0, float(round(10 * statistics.median(seconds[1:] or seconds))))


class AwakeClock:
    """Counts the seconds in which this process could run.

    So what was stopped together with this process, by ``scontrol suspend`` or with its machine, does not hang.
    """

    def __init__(self, longest: float, clock: Callable[[], float] = time.monotonic):
        self._longest, self._clock = longest, clock
        self._state = 0.0, clock()

    def now(self) -> float:
        base, ticked = self._state
        return base + min(self._clock() - ticked, self._longest)

    def tick(self) -> None:
        """To be called more often than every ``longest`` seconds: the process was stopped for what is above that."""
        self._state = self.now(), self._clock()
