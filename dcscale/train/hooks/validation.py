"""Loss on held-out data, independent of the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dcscale.data import BatchLoader
from dcscale.ops import bits_per_byte
from dcscale.parallel import Engine
from dcscale.train.data import next_step_batches
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


@dataclass(frozen=True)
class ValidationResult:
    loss: float
    """Mean over the targets, nats/token."""

    targets: int
    """Number of target tokens."""

    def bits_per_byte(self, text_bytes_per_target: float) -> float:
        """See :func:`dcscale.ops.bits_per_byte`."""
        return bits_per_byte(self.loss, text_bytes_per_target)


def evaluate(engine: Engine, loader: BatchLoader) -> ValidationResult | None:
    """Mean loss over all sequences of ``loader``; None if they have no target, as a mean over nothing is no loss.

    All ranks call it together and get the same result.

    Raises:
        DataError: on every rank, if any rank cannot read its data.
    """
    device = engine.environment.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = 0
    with engine.evaluating() as forward:
        steps = loader.steps()
        while (step := next_step_batches(engine, steps)) is not None:
            targets += step.targets
            for batch in step.micro_batches:
                batch = batch.to(device)
                total += forward(batch.input_ids, batch.targets, batch.document_ids)
    if not targets:
        return None
    return ValidationResult(float(engine.sum_tensor_over_ranks(total)) / targets, targets)


class Validation(Hook):
    """Computes the validation loss every ``interval`` steps and at the end of the run.

    Args:
        loader: this rank's validation batches.
        interval: steps between validations.
        text_bytes_per_target: mean UTF-8 bytes of text per target token; None (unknown): no bits per byte.
    """

    name = "validation"

    def __init__(self, loader: BatchLoader, interval: int, text_bytes_per_target: float | None):
        self._loader, self._interval, self._text_bytes_per_target = loader, interval, text_bytes_per_target
        self._last_step = -1
        self.last: dict[str, float] = {}
        """``validation_loss`` and ``bits_per_byte`` of the latest validation; empty before it, and without targets."""

    def after_step(self, trainer: Trainer) -> None:
        if due(trainer.state.step, self._interval):
            self._validate(trainer)

    def finish(self, trainer: Trainer, completed: bool) -> None:
        if completed and self._last_step != trainer.state.step:
            self._validate(trainer)

    def _validate(self, trainer: Trainer) -> None:
        result = evaluate(trainer.engine, self._loader)
        self._last_step, self.last = trainer.state.step, {}
        if result is None:
            trainer.warn(
                f"step {trainer.state.step} has no validation loss: the sequences of data.validation that are used "
                "have no target to predict; raise validation.sequences, or set validation.interval=0"
            )
            return
        self.last = {"validation_loss": result.loss}
        trainer.state.validation_loss = result.loss
        if self._text_bytes_per_target is not None:
            self.last["bits_per_byte"] = result.bits_per_byte(self._text_bytes_per_target)
        trainer.report({"step": trainer.state.step, **self.last})

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        return self.last

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._last_step, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._last_step, self.last = state["done_at"], state["last"]
