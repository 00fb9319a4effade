"""Checkpoints at an interval and whenever the run stops."""

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


WAIT_WORTH_TELLING = 1.0
"""Seconds."""


class Saving(Hook):
    """Must be the last hook, so that a checkpoint holds what the others did at its step.

    With ``on_error`` = ``warn`` only the checkpoint at the end of a start must succeed. Adds to a record how long
    saving has held training up, what the newest checkpoint took, and how many could not be written.
    """

    name = "saving"

    def __init__(self, interval: int, on_error: str = "fail"):
        self._interval, self._on_error = interval, on_error
        self._stall_seconds, self._failures = 0.0, 0
        self._recorded: Path | None = None

    def after_step(self, trainer: Trainer) -> None:
        checkpoints = trainer.checkpoints
        if checkpoints.busy:
            self._try(trainer, checkpoints.poll)
        # The last step is saved in finish, after the others' last work.
        if due(trainer.state.step, self._interval) and trainer.state.step < trainer.config.train.steps:
            if checkpoints.busy and (waited := self._try(trainer, checkpoints.wait)) >= WAIT_WORTH_TELLING:
                trainer.warn(
                    f"step {trainer.state.step} waited {waited:.1f} s for the earlier checkpoint to be written: they "
                    "come too fast for the disk (checkpoint.interval)"
                )
            self._try(trainer, trainer.save)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        self._try(trainer, trainer.checkpoints.wait)
        if trainer.state.step > 0:
            trainer.save()
            trainer.checkpoints.wait()

    def _try(self, trainer: Trainer, call: Callable[[], None]) -> float:
        """Calls, and treats a failure as configured; returns the seconds it took."""
        start = time.perf_counter()
        try:
            call()
        except CheckpointError as error:
            if self._on_error == "fail":
                raise
            self._failures += 1
            trainer.warn(f"{error}. Training goes on (checkpoint.on_error=warn)")
        seconds = time.perf_counter() - start
        self._stall_seconds += seconds
        return seconds

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        if self._stall_seconds:
            record["checkpoint_stall_seconds"], self._stall_seconds = self._stall_seconds, 0.0
        if self._on_error == "warn":
            record["checkpoint_failures"] = self._failures
        checkpoints = trainer.checkpoints
        if checkpoints.written_bytes and checkpoints.latest != self._recorded:
            self._recorded = checkpoints.latest
            record["checkpoint_write_seconds"] = checkpoints.write_seconds
            record["checkpoint_bytes"] = checkpoints.written_bytes
