"""Checkpoints at an interval and whenever the run stops."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Saving(Hook):
    """Must be the last hook, so that a checkpoint holds what the others did at its step."""

    name = "saving"

    def __init__(self, interval: int):
        self._interval = interval
        self._saved_at = -1

    def after_step(self, trainer: Trainer) -> None:
        # The last step is saved in finish, after the others' last work.
        if due(trainer.state.step, self._interval) and trainer.state.step < trainer.config.train.steps:
            self._save(trainer)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        if trainer.state.step not in (0, self._saved_at):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self._saved_at = trainer.state.step
        trainer.save()
