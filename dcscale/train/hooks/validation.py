"""Validation loss and bits per byte at an interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcscale.data import BatchLoader
from dcscale.train.evaluate import evaluate
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Validation(Hook):
    """Evaluates ``loader``'s sequences every ``interval`` steps and when the run is complete.

    ``text_bytes_per_target`` None (the shards do not say) leaves bits per byte out.
    """

    name = "validation"

    def __init__(self, loader: BatchLoader, interval: int, text_bytes_per_target: float | None):
        self._loader, self._interval, self._text_bytes_per_target = loader, interval, text_bytes_per_target
        self._done_at = -1
        self.last: dict[str, float] = {}
        """``validation_loss`` and ``bits_per_byte`` of the latest validation; empty before the first."""

    def after_step(self, trainer: Trainer) -> None:
        if due(trainer.state.step, self._interval):
            self._validate(trainer)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        if completed and self._done_at != trainer.state.step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        result = evaluate(trainer.engine, self._loader)
        self._done_at = trainer.state.step
        self.last = {"validation_loss": result.loss}
        trainer.state.validation_loss = result.loss
        if self._text_bytes_per_target is not None:
            self.last["bits_per_byte"] = result.bits_per_byte(self._text_bytes_per_target)
        trainer.report({"step": trainer.state.step, **self.last})

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._done_at, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done_at, self.last = state["done_at"], state["last"]
