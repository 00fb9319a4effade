"""Loss on held-out data, the same number for any count of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dcscale.data import BatchLoader, DataError
from dcscale.ops import bits_per_byte
from dcscale.parallel import Engine
from dcscale.train.batches import next_together


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
        while (step := next_together(engine, steps)) is not None:
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
