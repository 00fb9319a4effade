"""Simulates a run with failures event by event, and computes the same in closed form.

The run: after each ``interval`` seconds of training the loop stops for ``stall`` seconds to copy its state, and goes on
while the copy is written. ``durable`` seconds after the save began the checkpoint is complete. A failure loses what was
trained after the newest complete checkpoint; after ``notice`` all ranks have ended, after ``restart`` the run trains
again. A save that is due while the one before is still being written waits for it, as in
:mod:`dcscale.checkpoint.checkpointer`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import chain, repeat

DAY = 86_400.0
MOST_SAVES = 1_000_000
"""Of one simulated run."""


@dataclass(frozen=True)
class Times:
    """What checkpoints and failures cost, in seconds."""

    stall: float
    """Training waits so long for each checkpoint: the synchronous part."""

    durable: float
    """From the beginning of a save to the complete checkpoint; at least ``stall``."""

    notice: float
    """From a failure to the end of all ranks."""

    restart: float
    """From there to the first step of the next start: requeue, start, loading, what the first step takes longer."""

    slowdown: float = 0.0
    """Part of the speed that training loses while a checkpoint is written, in [0, 1)."""

    time_limit: float | None = None
    """A start is stopped after so many seconds with a checkpoint, and the next begins; None: never."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{item.name} is {value}: it must be a number of at least 0")
        if self.durable < self.stall:
            raise ValueError(
                f"durable is {self.durable:g} s, and stall {self.stall:g} s: a checkpoint is not complete before the "
                "loop goes on, so durable must be at least as long"
            )
        if self.slowdown >= 1:
            raise ValueError(f"slowdown is {self.slowdown}: it must be below 1, or no step would end")
        if self.time_limit is not None and self.time_limit <= self.restart:
            raise ValueError(
                f"time_limit is {self.time_limit:g} s: it must be above restart, {self.restart:g} s, or no step is done"
            )

    @property
    def overhead(self) -> float:
        """What a checkpoint costs without failures, in seconds of training: Young's and Daly's delta."""
        return self.stall + self.slowdown * (self.durable - self.stall)


@dataclass
class Outcome:
    """Where the time of a simulated run went, in seconds; the parts add up to ``wall``."""

    wall: float
    useful: float = 0.0
    """Training that the run has at the end."""

    lost: float = 0.0
    """Training that was done again, or must be."""

    stalled: float = 0.0
    """Waiting for checkpoints, also those at the end of a start."""

    slowed: float = 0.0
    """What training took longer while checkpoints were written."""

    down: float = 0.0
    """From failures to the next first step."""

    planned: float = 0.0
    """Starting again after a time limit."""

    failures: int = 0
    """Failures that met a run that was training, saving or starting."""

    checkpoints: int = 0
    """Complete checkpoints."""

    @property
    def goodput(self) -> float:
        return self.useful / self.wall


def exponential(mean: float, seed: int) -> Iterator[float]:
    """Times of failures that do not know of each other, on average ``mean`` seconds apart."""
    generator, now = random.Random(seed), 0.0
    while True:
        now += generator.expovariate(1 / mean)
        yield now


def fixed(period: float, seed: int) -> Iterator[float]:
    """Times of failures exactly ``period`` seconds apart; the first at a random moment of the first period."""
    now = random.Random(seed).uniform(0, period)
    while True:
        yield now
        now += period


ARRIVALS = {"exponential": exponential, "fixed": fixed}


def simulate(times: Times, interval: float, failures: Iterable[float], wall: float = DAY) -> Outcome:
    """Simulates a run that begins with its first step.

    Args:
        times: the costs.
        interval: seconds of training between two saves, above 0.
        failures: when something fails, ascending; one while the ranks notice an earlier one changes nothing.
        wall: seconds of wall-clock time to simulate.

    Raises:
        ValueError: the interval is not above 0, or so short that the simulation would take minutes.
    """
    if not interval > 0:
        raise ValueError(f"interval is {interval}: it must be above 0")
    if wall / interval > MOST_SAVES:
        raise ValueError(
            f"interval is {interval:.3g} s: at most {MOST_SAVES:,} intervals can be simulated, and this would be more "
            f"in {wall:.3g} s"
        )
    return _Run(times, interval, failures, wall).run()


class _Run:
    def __init__(self, times: Times, interval: float, failures: Iterable[float], wall: float):
        self.times, self.interval, self.out = times, interval, Outcome(wall)
        self.failures = chain(failures, repeat(math.inf))
        self.failure = next(self.failures)
        self.now = self.work = 0.0
        """Wall-clock time, and seconds of training that the run has."""
        self.saved = self.last_save = 0.0
        """Training in the newest complete checkpoint, and at the last save."""
        self.writing: tuple[float, float] | None = None
        """When the checkpoint that is being written will be complete, and the training in it."""
        self.stop_at = math.inf if times.time_limit is None else times.time_limit

    def run(self) -> Outcome:
        while self.now < self.out.wall:
            if not (self._train() and (self._stop() if self.now >= self.stop_at else self._save())):
                self._fail()
        self.out.useful = self.work
        return self.out

    def _pass(self, until: float) -> bool:
        """Lets time pass until then, or until a failure or the end of the simulation, whichever is first.

        Returns whether ``until`` was reached.
        """
        end = min(until, self.failure, self.out.wall)
        if self.writing is not None and self.writing[0] <= end:
            self.saved, self.writing = self.writing[1], None
            self.out.checkpoints += 1
        self.now = end
        return until < min(self.failure, self.out.wall)

    def _train(self) -> bool:
        """Trains until a save is due or the start must stop."""
        while self.work < (due := self.last_save + self.interval) and self.now < self.stop_at:
            speed = 1.0 if self.writing is None else 1 - self.times.slowdown
            begin, end = self.now, self.now + (due - self.work) / speed
            next_stop = min(end, self.stop_at, math.inf if self.writing is None else self.writing[0])
            reached = self._pass(next_stop)
            passed = self.now - begin
            self.work = due if reached and next_stop == end else self.work + passed * speed
            self.out.slowed += passed * (1 - speed)
            if not reached:
                return False
        return True

    def _save(self, wait_for_it: bool = False) -> bool:
        begin = self.now
        reached = self.writing is None or self._pass(self.writing[0])
        if reached:
            self.last_save, self.writing = self.work, (self.now + self.times.durable, self.work)
            reached = self._pass(self.now + (self.times.durable if wait_for_it else self.times.stall))
        self.out.stalled += self.now - begin
        return reached

    def _stop(self) -> bool:
        """Ends a start at its time limit, and begins the next."""
        if not self._save(wait_for_it=True):
            return False
        begin = self.now
        reached = self._restart()
        self.out.planned += self.now - begin
        return reached

    def _restart(self) -> bool:
        if self.times.time_limit is not None:
            self.stop_at = self.now + self.times.time_limit
        return self._pass(self.now + self.times.restart)

    def _fail(self) -> None:
        """Handles failures until the run trains again, or the simulation ends."""
        self.out.lost += self.work - self.saved if self.now < self.out.wall else 0.0
        begin, ended = self.now, self.now >= self.out.wall
        while not ended:
            self.work = self.last_save = self.saved
            self.writing = None
            self.out.failures += 1
            self.now = min(self.now + self.times.notice, self.out.wall)
            while self.failure <= self.now:
                self.failure = next(self.failures)
            ended = self.now >= self.out.wall or self._restart() or self.now >= self.out.wall
        self.out.down += self.now - begin


def expected_goodput(times: Times, interval: float, mtbf: float) -> float:
    """Goodput of an endless run with exponentially distributed failures; exact, but ignores ``time_limit``.

    Between two failures the run is a chain of attempts to complete the next checkpoint. The first after a restart needs
    ``interval + durable`` seconds, the others one cycle, of ``interval + overhead`` seconds, or of ``durable`` if the
    checkpoint before is still being written then. An attempt of t seconds succeeds with probability exp(-t / mtbf). If
    writing is all stall (durable = stall) and notice is 0, it is Daly's exact formula:
    goodput = (interval / mtbf) exp(-restart / mtbf) / (exp((interval + stall) / mtbf) - 1).

    Args:
        times: the costs.
        interval: seconds of training between two saves.
        mtbf: mean seconds between failures.
    """
    first = interval + times.durable
    cycle = interval + times.overhead
    if times.stall + interval / (1 - times.slowdown) < times.durable:
        cycle = times.durable
    if first / mtbf > 700 or times.restart / mtbf > 700:
        return 0.0  # exp would overflow: no checkpoint is ever complete
    success_first, success = math.exp(-first / mtbf), math.exp(-cycle / mtbf)
    # Attempts after a restart per other attempt, from the balance of the chain.
    firsts = (1 - success) / success_first
    failed = firsts * (1 - success_first) + (1 - success)
    # Failures during a restart begin it again, after they are noticed.
    outage = times.notice * math.exp(times.restart / mtbf) + mtbf * math.expm1(times.restart / mtbf)
    return interval * (firsts * success_first + success) / (failed * (mtbf + outage))


def young_interval(times: Times, mtbf: float) -> float:
    """Young's best interval, sqrt(2 delta mtbf), in seconds of training."""
    return math.sqrt(2 * times.overhead * mtbf)


def daly_interval(times: Times, mtbf: float) -> float:
    """Daly's best interval (2006, equation 37), in seconds of training."""
    delta = times.overhead
    if delta >= 2 * mtbf:
        return mtbf
    ratio = math.sqrt(delta / (2 * mtbf))
    return math.sqrt(2 * delta * mtbf) * (1 + ratio / 3 + ratio**2 / 9) - delta


def best_interval(times: Times, mtbf: float, shortest: float = 1.0) -> float:
    """The interval with the highest :func:`expected_goodput`, in seconds of training, to 0.2 %.

    Args:
        times: the costs.
        mtbf: mean seconds between failures.
        shortest: the shortest interval that is possible: a step.
    """
    longest = max(4 * mtbf, 2 * shortest)
    count = math.ceil(math.log(longest / shortest) / 0.002)
    grid = (shortest * math.exp(0.002 * number) for number in range(count + 1))
    return max(grid, key=lambda interval: expected_goodput(times, interval, mtbf))
