"""How long this rank itself takes for each phase of a step: wall-clock time without waiting for other ranks."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

PHASES = ("data", "forward", "backward", "update")


class _Waits(threading.local):
    seconds = 0.0
    """Seconds that this thread has waited for collectives on the CPU."""


_waits = _Waits()
_wait = dist.Work.wait


def _timed_wait(work: dist.Work, *arguments: Any, **keywords: Any) -> Any:
    start = time.perf_counter()
    try:
        return _wait(work, *arguments, **keywords)
    finally:
        _waits.seconds += time.perf_counter() - start


class StepClock:
    """Sums the own time of this rank by phase.

    On a CPU, the time that the thread spends in ``torch.distributed.Work.wait`` is waiting: every collective ends
    there, DeepSpeed's too. It includes the transfer, which takes all ranks equally long.

    On a GPU the host does not see collectives, so ``forward`` and ``backward`` are measured by CUDA events, and
    ``update`` begins when the gradient norm is known. Under ZeRO-3 forward and backward then include waiting for
    gathered parameters, so a slow rank shows less. (Not run on a GPU yet.)

    Args:
        device: where the model computes.
    """

    def __init__(self, device: torch.device):
        dist.Work.wait = _timed_wait
        self._on_gpu = device.type == "cuda"
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._start = self._waited = 0.0
        self._own = dict.fromkeys(PHASES, 0.0)
        self._waiting = 0.0

    def phase(self, name: str) -> contextlib.AbstractContextManager[None]:
        """Adds the time within the context, which contains no other phase, to the phase ``name``.

        A trace that is being recorded shows it as a span of that name.
        """
        return self._traced(name) if torch.autograd._profiler_enabled() else self._timed(name)

    @contextlib.contextmanager
    def _traced(self, name: str) -> Iterator[None]:
        with record_function(name), self._timed(name):
            yield

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        if self._on_gpu and name in ("forward", "backward"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        self._start, self._waited = time.perf_counter(), _waits.seconds
        try:
            yield
        finally:
            waited = _waits.seconds - self._waited
            self._waiting += waited
            self._own[name] += time.perf_counter() - self._start - waited

    def device_caught_up(self) -> None:
        """The device has done all its work: on a GPU, the phase so far was waiting for that."""
        if self._on_gpu:
            now = time.perf_counter()
            self._waiting += now - self._start
            self._start, self._waited = now, _waits.seconds

    def pop(self) -> tuple[list[float], float]:
        """Seconds of each of :data:`PHASES`, and seconds of waiting in them, since the last call."""
        for name, start, end in self._events:
            end.synchronize()
            self._own[name] += start.elapsed_time(end) / 1000
        times = list(self._own.values()), self._waiting
        self._events, self._own, self._waiting = [], dict.fromkeys(PHASES, 0.0), 0.0
        return times
