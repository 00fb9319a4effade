"""Distance of each layer's head composition from the identity, as a metric."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcscale.observe.metrics import COMPOSE_PREFIX
from dcscale.train.hooks.base import Hook, due

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class ComposeDistance(Hook):
    """Records :func:`dcscale.ops.identity_distance` of the first sequence of rank 0's latest micro-batch, per layer."""

    name = "compose_distance"

    def __init__(self, interval: int):
        self._interval = interval

    def after_step(self, trainer: Trainer) -> None:
        step = trainer.state.step
        if not (due(step, self._interval) or (self._interval and step in (1, trainer.config.train.steps))):
            return
        batch = trainer.latest_batch
        with trainer.engine.evaluating():
            distances = trainer.engine.module.compose_distances(
                batch.input_ids[:1], None if batch.document_ids is None else batch.document_ids[:1]
            )
        trainer.report({"step": step, **{COMPOSE_PREFIX + name: float(value) for name, value in distances.items()}})
