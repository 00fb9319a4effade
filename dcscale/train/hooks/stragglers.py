"""Times of the steps on each rank, in event files, and the ranks that are slower than the others."""

from __future__ import annotations

import socket
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from dcscale.observe.metrics import Record
from dcscale.parallel import PHASES
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer

EXCESS = 0.07
"""A rank that is slower than the others by less than this is no straggler, so that one of 10 % surely is."""

STANDARD_ERRORS = 8
"""Nor is one whose excess is less than this many standard errors: each check asks all ranks, for millions of steps."""

LEAST_SECONDS = 0.001
"""Nor one that is slower by less than this a step, which is about the scheduler of the operating system."""

MOST_WARNINGS = 8
"""Stragglers that are printed at once; all are in the events."""


class Straggler(NamedTuple):
    rank: int

    excess: float
    """Its own time of a step / the median of the other ranks - 1: median over the window."""

    seconds: float
    """Its own time of a step, median over the window."""

    phase: str
    """The phase that differs most from the other ranks."""

    phase_seconds: float
    """How much longer the phase takes than on the other ranks, in seconds a step."""


class StragglerFinder:
    """Compares the own times of the ranks over a sliding window of steps.

    In each step, the own time of a rank is divided by the median of the other ranks. Its excess is the median of this
    ratio over the window - 1, so single slow steps do not count. How far it may be off by chance is estimated twice,
    and the larger estimate counts: from the spread over the steps of the window, and from the changes from one block
    of steps to the next, which also holds where ranks are slow for some steps in a row.

    Args:
        window: blocks of steps in the window.
        history: blocks from which the changes between blocks are estimated.
    """

    def __init__(self, window: int = 4, history: int = 64):
        # Of each block: own seconds RS, log of their ratio to the other ranks RS, seconds more than these RSP.
        self._window: deque[tuple[np.ndarray, np.ndarray, np.ndarray]] = deque(maxlen=window)
        self._log_BR: deque[np.ndarray] = deque(maxlen=history)  # medians of the log in each block
        self.excess_R: np.ndarray | None = None
        """Excess of each rank over the window; None until the window is full."""

    def add(self, times_RSP: np.ndarray) -> list[Straggler]:
        """Adds a block: own seconds of every rank in each step and phase. Returns the stragglers, slowest first."""
        times_RS = times_RSP.sum(-1)
        log_RS = np.log(times_RS / median_of_others(times_RS))
        self._window.append((times_RS, log_RS, times_RSP - median_of_others(times_RSP)))
        self._log_BR.append(np.median(log_RS, axis=1))
        if len(self._window) < self._window.maxlen:
            return []
        times_RS, log_RS, longer_RSP = (np.concatenate(blocks, axis=1) for blocks in zip(*self._window, strict=True))
        log_R = np.median(log_RS, axis=1)
        self.excess_R = np.expm1(log_R)
        seconds_R = np.median(times_RS, axis=1)
        slow_R = (
            (self.excess_R >= EXCESS)
            & (log_R >= STANDARD_ERRORS * self._standard_error(log_RS, log_R))
            & (self.excess_R * seconds_R >= LEAST_SECONDS)
        )
        stragglers = []
        for rank in sorted(np.flatnonzero(slow_R).tolist(), key=lambda rank: -self.excess_R[rank]):
            longer_P = np.median(longer_RSP[rank], axis=0)
            phase = PHASES[int(longer_P.argmax())]
            excess, seconds = float(self.excess_R[rank]), float(seconds_R[rank])
            stragglers.append(Straggler(rank, excess, seconds, phase, float(longer_P.max())))
        return stragglers

    def _standard_error(self, log_RS: np.ndarray, log_R: np.ndarray) -> np.ndarray:
        # 1.4826 * median absolute deviation estimates the standard deviation, without outliers. The standard error of a
        # median of n values is 1.25 standard deviations / sqrt(n).
        deviation_R = np.median(np.abs(log_RS - log_R[:, None]), axis=1)
        of_steps_R = 1.25 * 1.4826 * deviation_R / log_RS.shape[1] ** 0.5
        # A difference has twice the variance of a block, and the window is the mean of its blocks.
        change = np.median(np.abs(np.diff(np.stack(self._log_BR), axis=0)))
        of_blocks = 1.4826 * change / (2 * len(self._window)) ** 0.5
        return np.maximum(of_steps_R, max(np.median(of_steps_R), of_blocks))


def median_of_others(values: np.ndarray) -> np.ndarray:
    """For each of at least two ranks, the first axis, the median of the other ranks; of the same shape."""
    in_order = np.sort(values, axis=0)
    place = np.argsort(np.argsort(values, axis=0, kind="stable"), axis=0)  # of each value in ``in_order``
    # Without the rank itself, what is behind it in order moves up by one.
    middles = (len(values) - 2) // 2, (len(values) - 1) // 2
    low, high = (np.take_along_axis(in_order, middle + (place <= middle), axis=0) for middle in middles)
    return (low + high) / 2


class Stragglers(Hook):
    """Writes the times of the steps into the event file of each rank, and names the ranks that are slow.

    Rank 0 compares the ranks after every block of steps. Steps during which a checkpoint is written do not count: rank
    0 writes more than the others. A rank is named once, and again if it becomes twice as slow, or after it had
    recovered.

    Args:
        interval: steps between ``steps`` events.
        block: steps between comparisons; four blocks are compared, so that a rank is named within five.
    """

    name = "stragglers"

    def __init__(self, interval: int, block: int = 10):
        self._interval, self._block = interval, block
        self._hosts: list[str] = []  # by rank
        self._finder = StragglerFinder()
        self._since_event: list[list[float]] = []  # of each step: wall-clock seconds, own by phase, waiting
        self._since_check: list[list[float]] = []  # of each step: own seconds by phase
        self._named: dict[int, float] = {}
        """Excess of each rank that is called slow, when it was called so."""

    def after_step(self, trainer: Trainer) -> None:
        own, waiting = trainer.engine.clock.pop()
        self._since_event.append([trainer.step_seconds, *own, waiting])
        if due(trainer.state.step, self._interval):
            self._write_steps(trainer)
        if trainer.environment.world_size == 1 or trainer.checkpointer.busy:
            return
        self._since_check.append(own)
        if len(self._since_check) == self._block:
            self._check(trainer)

    def _write_steps(self, trainer: Trainer) -> None:
        means = np.mean(self._since_event, axis=0).round(6).tolist()
        names = ("seconds", *PHASES, "waiting")
        trainer.events.write(
            "steps", step=trainer.state.step, steps=len(self._since_event), **dict(zip(names, means, strict=True))
        )
        self._since_event = []

    def _check(self, trainer: Trainer) -> None:
        if not self._hosts:
            self._hosts = trainer.engine.gather_objects(socket.gethostname())
        times = trainer.engine.gather_on_rank0(torch.tensor(self._since_check, dtype=torch.float64))
        self._since_check = []
        if times is not None:
            self._report(trainer, self._finder.add(torch.stack(times).numpy()))

    def _report(self, trainer: Trainer, stragglers: list[Straggler]) -> None:
        step, excess_R = trainer.state.step, self._finder.excess_R
        if excess_R is None:
            return
        for rank in [rank for rank in self._named if excess_R[rank] < EXCESS / 2]:
            del self._named[rank]
            trainer.warn(f"rank {rank} ({self._hosts[rank]}) is no longer slower than the others, at step {step}")
            trainer.events.write("recovered", step=step, rank=rank, host=self._hosts[rank])
        new = [slow for slow in stragglers if slow.excess >= 2 * self._named.get(slow.rank, 0.0)]
        for number, slow in enumerate(new):
            self._named[slow.rank] = slow.excess
            trainer.events.write("straggler", step=step, host=self._hosts[slow.rank], **slow._asdict())
            if number < MOST_WARNINGS:
                trainer.warn(
                    f"rank {slow.rank} ({self._hosts[slow.rank]}) is {slow.excess:.0%} slower than the other ranks, "
                    f"which wait for it: {slow.seconds:.3g} s a step up to step {step}, {slow.phase_seconds:.3g} s "
                    f"longer in {slow.phase}"
                )
        if len(new) > MOST_WARNINGS:
            trainer.warn(
                f"{len(new) - MOST_WARNINGS} more ranks are slower than the others at step {step}, see the events"
            )

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        excess_R = self._finder.excess_R
        if excess_R is not None:
            record["slowest_rank"] = int(np.argmax(excess_R))
            record["slowest_over_median"] = 1 + float(excess_R.max())

    def finish(self, trainer: Trainer, completed: bool) -> None:
        if self._since_event:
            self._write_steps(trainer)
