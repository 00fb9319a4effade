"""Looks into the running job: traces and memory of steps, asked for by a file in the run folder or planned."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dcscale.config.schema.observe import MOST_PROFILED_STEPS
from dcscale.observe.memory import MemoryLook
from dcscale.observe.requests import MEMORY, OUTPUT, PROFILE, Request, RequestError
from dcscale.observe.traces import StepTrace
from dcscale.train.hooks.base import Hook

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


@dataclass
class _Look:
    """What all ranks do from step ``first`` to step ``last``; only some of them record."""

    request: Request
    first: int
    last: int
    recorder: StepTrace | MemoryLook | None = None
    """None: not on this rank, or it could not start."""

    planned: bool = False
    """By ``log.profile_steps``."""

    @property
    def name(self) -> str:
        return f"{self.request.kind} of step {self.first}"


class OnDemand(Hook):
    """Follows requests, and profiles the steps that are planned. Must be the first hook, so that it stops first.

    Rank 0 looks for the files while batches are read, and all ranks learn of it with the batches, so a look starts with
    the same step everywhere, and costs nothing while there is none. Nothing that fails here ends the run: it is
    reported.

    Args:
        planned: steps to profile, ascending; those in a row are one trace, of rank 0.
    """

    name = "on_demand"

    def __init__(self, planned: Sequence[int] = ()):
        self._planned = frozenset(planned)
        self._looks: list[_Look] = []

    def before_step(self, trainer: Trainer) -> None:
        if not self._looks:
            self._begin(trainer)
        for look in self._looks:
            if look.recorder is not None:
                look.recorder.begin_step(trainer.state.step + 1)

    def after_step(self, trainer: Trainer) -> None:
        if not self._looks:  # a step after the last look: it needed all ranks, so all have written
            trainer.watchdog.patient = False
        for look in self._looks:
            if look.recorder is not None:
                look.recorder.end_step()
        ended = [look for look in self._looks if look.last <= trainer.state.step]
        self._looks = [look for look in self._looks if look not in ended]
        for look in ended:
            self._end(trainer, look)

    def before_rollback(self, trainer: Trainer) -> None:
        self._interrupt(trainer)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        self._interrupt(trainer)
        if not trainer.environment.is_main:
            return
        for kind in trainer.request_files.waiting():
            if not completed:
                self._say(trainer, f"warning    {trainer.run / kind} is left for the next start, since the run stops")
            elif self._take(trainer, kind) is not None:
                self._refuse(trainer, kind, f"{trainer.run / kind} came too late: the run is complete")

    # -- the beginning --------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer) -> None:
        """Starts what was asked for or planned; all ranks call it together."""
        step, requests = trainer.state.step + 1, list[Request]()
        if trainer.look_requested:
            own = []
            if trainer.environment.is_main:
                own = [self._take(trainer, kind) for kind in trainer.request_files.waiting()]
            requests = [request for request in trainer.engine.gather_objects(own)[0] if request is not None]
        looks = [self._look(trainer, request) for request in requests]
        if step in self._planned and not any(request.kind == PROFILE for request in requests):
            steps = next(n for n in range(1, MOST_PROFILED_STEPS + 1) if step + n not in self._planned)
            looks.append(self._look(trainer, Request(PROFILE, steps), planned=True))
        # Memory first: its tables shall not contain what a trace takes.
        self._looks = sorted(looks, key=lambda look: look.request.kind != MEMORY)
        if self._looks:  # torch holds the lock of Python for some 10 µs a span when a trace ends, so: no heartbeats
            trainer.watchdog.patient = True
        for look in self._looks:
            if look.request.of_rank(trainer.environment.rank):
                self._start(trainer, look)

    @staticmethod
    def _look(trainer: Trainer, request: Request, planned: bool = False) -> _Look:
        train, step = trainer.config.train, trainer.state.step + 1
        end = train.steps if train.stop_after is None else min(train.steps, train.stop_after)
        steps = 1 if request.kind == MEMORY else request.steps
        return _Look(request, step, min(end, step + steps - 1), planned=planned)

    def _take(self, trainer: Trainer, kind: str) -> Request | None:
        """On rank 0: the request, if there is one that can be followed."""
        try:
            return trainer.request_files.take(kind, trainer.environment.world_size)
        except RequestError as error:
            self._refuse(trainer, kind, str(error))
            return None

    def _start(self, trainer: Trainer, look: _Look) -> None:
        device, request = trainer.environment.device, look.request
        try:
            recorder = MemoryLook(device) if request.kind == MEMORY else StepTrace(device, request.options)
            recorder.start()
            look.recorder = recorder
        except Exception as error:  # of any library, and no reason to end the run
            self._refuse(trainer, request.kind, f"{look.name}: {_text(error)}")

    # -- the end --------------------------------------------------------------------------------------------------

    def _end(self, trainer: Trainer, look: _Look) -> None:
        """Writes what this look has recorded."""
        if look.recorder is None:
            return
        try:
            begin = time.perf_counter()
            look.recorder.stop()
            self._write(trainer, look, look.recorder, begin)
        except Exception as error:  # a full disk, or of any library: no reason to end the run
            self._refuse(trainer, look.request.kind, f"{look.name}: {_text(error)}")

    def _interrupt(self, trainer: Trainer) -> None:
        """Drops looks whose steps are not done: a run that stops has no time to write them before its checkpoint.

        Their requests are put back, and followed by the next start, or after the rollback.
        """
        looks, self._looks = self._looks, []
        for look in looks:
            kind = look.request.kind
            try:
                if look.recorder is not None:
                    look.recorder.stop()
                if trainer.environment.is_main and not look.planned:
                    trainer.request_files.put_back(look.request)
            except Exception as error:  # a full disk, or of any library: no reason to end the run
                self._refuse(trainer, kind, f"{look.name}: {_text(error)}")
            if look.planned and look.recorder is not None:
                self._refuse(trainer, kind, f"{look.name}: the run stops or goes back before its last step is done")

    def _write(self, trainer: Trainer, look: _Look, recorder: StepTrace | MemoryLook, begin: float) -> None:
        rank, kind = trainer.environment.rank, look.request.kind
        steps = f"step {look.first}" if look.last == look.first else f"steps {look.first} to {look.last}"
        folder = trainer.run / OUTPUT / f"step-{look.first}"
        title = f"{kind} of {steps}, rank {rank} of {trainer.environment.world_size} on {socket.gethostname()}"
        paths = recorder.write(folder, f"rank-{rank}{recorder.suffix}", title)
        seconds = time.perf_counter() - begin
        trainer.events.write(
            "memory" if kind == MEMORY else "profile",
            step=look.first,
            steps=look.last - look.first + 1,
            files=[str(path) for path in paths],
            bytes=sum(path.stat().st_size for path in paths),
            seconds=round(seconds, 3),
        )
        self._say(trainer, f"{kind:<10} {steps}: {paths[0]} (written in {seconds:.1f} s)")

    def _refuse(self, trainer: Trainer, kind: str, reason: str) -> None:
        self._say(trainer, f"warning    {reason}")
        trainer.events.write("request_failure", step=trainer.state.step, request=kind, error=reason)

    @staticmethod
    def _say(trainer: Trainer, text: str) -> None:
        if trainer.environment.is_main:
            trainer.line(text)
        else:  # into its own log
            print(text, file=sys.stderr, flush=True)


def _text(error: Exception) -> str:
    return f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.strerror else str(error)
