"""Loss on held-out data, the same number for any count of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from dcscale.data import BatchLoader, DataError
from dcscale.ops import bits_per_byte
from dcscale.parallel import Engine
from dcscale.train.data import next_on_all_ranks
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


@dataclass(frozen=True)
class Evaluation:
    loss: float
    """Nats a token, mean over the targets."""

    targets: int
    """Targets that were predicted."""

    def bits_per_byte(self, text_bytes_per_target: float) -> float:
        """See :func:`dcscale.ops.bits_per_byte`."""
        return bits_per_byte(self.loss, text_bytes_per_target)


def evaluate(engine: Engine, loader: BatchLoader) -> Evaluation:
    """Mean loss over all sequences of ``loader``; every rank calls it and gets the same result.

    Raises:
        DataError: on every rank, if the held-out data of any cannot be read, or there is nothing to predict in them.
    """
    device = engine.environment.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    targets = 0
    with engine.evaluating() as forward:
        steps = loader.steps()
        while (step := next_on_all_ranks(engine, steps)) is not None:
            targets += step.targets
            for batch in step.micro_batches:
                batch = batch.to(device)
                total += forward(batch.input_ids, batch.targets, batch.document_ids)
    if not targets:
        raise DataError(
            "data.validation: there is nothing to predict in the sequences that are used; raise validation.sequences, "
            "or set validation.interval=0"
        )
    return Evaluation(float(engine.sum_tensor_over_ranks(total)) / targets, targets)


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

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        return self.last

    def state_dict(self) -> dict[str, Any]:
        return {"done_at": self._done_at, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._done_at, self.last = state["done_at"], state["last"]
