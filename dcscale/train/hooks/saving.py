"""Saves checkpoints, at an interval and whenever the run stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.checkpoint import CheckpointError
from dcscale.observe.metrics import Record
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


WARN_AFTER_SECONDS = 1.0
"""Default of ``warn_after_seconds``."""


class Saving(Hook):
    """Saves checkpoints and records stall time, write time, size and failures. Must be the last hook.

    Args:
        interval: steps between checkpoints, besides those that ``trainer.save_requested``; 0: only when the run stops.
        on_error: ``fail`` raises if a checkpoint cannot be written; ``warn`` prints a warning and continues, and only
            the checkpoint at the end of a start must succeed.
        warn_after_seconds: print a warning if a step waits at least this long for the previous checkpoint.
    """

    name = "saving"

    def __init__(self, interval: int, on_error: str = "fail", *, warn_after_seconds: float = WARN_AFTER_SECONDS):
        self._interval, self._on_error, self._warn_after_seconds = interval, on_error, warn_after_seconds
        self._stall_seconds, self._failures = 0.0, 0
        self._recorded: Path | None = None
        self._in_events: Path | None = None

    def after_step(self, trainer: Trainer) -> None:
        checkpointer = trainer.checkpointer
        if checkpointer.busy:
            self._try(trainer, checkpointer.poll)
        # finish() saves the last step, after the last work of the other hooks.
        is_due = due(trainer.state.step, self._interval) or trainer.save_requested
        if is_due and trainer.state.step < trainer.config.train.steps:
            if checkpointer.busy:
                wait_seconds = self._try(trainer, checkpointer.wait)
                if wait_seconds >= self._warn_after_seconds:
                    trainer.warn(
                        f"step {trainer.state.step} waited {wait_seconds:.1f} s for the previous checkpoint to be "
                        "written: the disk is too slow for this checkpoint.interval"
                    )
            self._try(trainer, trainer.save)

    def before_rollback(self, trainer: Trainer) -> None:
        self._try(trainer, trainer.checkpointer.wait)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        self._try(trainer, trainer.checkpointer.wait)
        if trainer.state.step > 0:
            trainer.save()
            trainer.checkpointer.wait()
            self._write_event(trainer)

    def _try(self, trainer: Trainer, call: Callable[[], None]) -> float:
        """Calls ``call`` and handles a failure as ``on_error`` says; returns the seconds it took."""
        start = time.perf_counter()
        try:
            call()
        except CheckpointError as error:
            if self._on_error == "fail":
                raise
            self._failures += 1
            trainer.warn(f"{error}. Training continues (checkpoint.on_error=warn)")
            if trainer.environment.is_main:
                trainer.events.write("checkpoint_failure", step=trainer.state.step, error=str(error))
        self._write_event(trainer)
        seconds = time.perf_counter() - start
        self._stall_seconds += seconds
        return seconds

    def _write_event(self, trainer: Trainer) -> None:
        checkpointer = trainer.checkpointer
        if trainer.environment.is_main and checkpointer.written_bytes and checkpointer.latest != self._in_events:
            self._in_events = checkpointer.latest
            trainer.events.write(
                "checkpoint",
                step=trainer.state.step,
                checkpoint=str(checkpointer.latest),
                seconds=checkpointer.write_seconds,
                bytes=checkpointer.written_bytes,
            )

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        if self._stall_seconds:
            record["checkpoint_stall_seconds"], self._stall_seconds = self._stall_seconds, 0.0
        if self._on_error == "warn":
            record["checkpoint_failures"] = self._failures
        checkpointer = trainer.checkpointer
        if checkpointer.written_bytes and checkpointer.latest != self._recorded:
            self._recorded = checkpointer.latest
            record["checkpoint_write_seconds"] = checkpointer.write_seconds
            record["checkpoint_bytes"] = checkpointer.written_bytes
