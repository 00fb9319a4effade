"""Checkpoints at an interval and whenever the run stops."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dcscale.checkpoint import CheckpointError
from dcscale.train.hooks.base import Hook, Record, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


WAIT_WORTH_TELLING = 1.0
"""Seconds."""


class Saving(Hook):
    """Must be the last hook, so that a checkpoint holds what the others did at its step.

    With ``on_error`` = ``warn`` only the checkpoint at the end of a start must succeed. Adds to each record how long
    saving held training up and how many checkpoints failed, and to the first one after a checkpoint what it took.
    """

    name = "saving"

    def __init__(self, interval: int, on_error: str = "fail"):
        self._interval, self._on_error = interval, on_error
        self._stall_seconds, self._failures = 0.0, 0
        self._recorded = None

    def after_step(self, trainer: Trainer) -> None:
        self._try(trainer, trainer.checkpoints.poll)
        # The last step is saved in finish, after the others' last work.
        if due(trainer.state.step, self._interval) and trainer.state.step < trainer.config.train.steps:
            if trainer.checkpoints.busy:
                start = time.perf_counter()
                self._try(trainer, trainer.checkpoints.wait)
                waited = time.perf_counter() - start
                if waited >= WAIT_WORTH_TELLING:
                    trainer.warn(
                        f"step {trainer.state.step} waited {waited:.1f} s for the earlier checkpoint to be written: "
                        "they come too fast for the disk (checkpoint.interval)"
                    )
            self._try(trainer, trainer.save)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        self._try(trainer, trainer.checkpoints.wait)
        if trainer.state.step > 0:
            trainer.save()
            trainer.checkpoints.wait()

    def _try(self, trainer: Trainer, call: Callable[[], None]) -> None:
        start = time.perf_counter()
        try:
            call()
        except CheckpointError as error:
            if self._on_error == "fail":
                raise
            self._failures += 1
            trainer.warn(f"{error}. Training goes on (checkpoint.on_error=warn)")
        self._stall_seconds += time.perf_counter() - start

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        record["checkpoint_stall_seconds"], self._stall_seconds = self._stall_seconds, 0.0
        record["checkpoint_failures"] = self._failures
        checkpoints = trainer.checkpoints
        if checkpoints.written_bytes and checkpoints.latest != self._recorded:
            self._recorded = checkpoints.latest
            record["checkpoint_write_seconds"] = checkpoints.write_seconds
            record["checkpoint_bytes"] = checkpoints.written_bytes
