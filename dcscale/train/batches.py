"""The next batch on all ranks, or its failure on all ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

from dcscale.data import Batch, DataError
from dcscale.parallel import Engine


@dataclass(frozen=True)
class StepBatches:
    """What a step works on."""

    micro_batches: list[Batch]
    """This rank's part, on the CPU."""

    targets: int
    """Targets with a loss in the whole global batch."""

    stop: bool
    """Whether any rank was told to stop."""

    waited: float
    """Seconds this rank waited for its own part."""


def next_together(engine: Engine, batches: Iterator[list[Batch]], stop: bool = False) -> StepBatches | None:
    """The next step's batches; None where they end, which is the same step on every rank.

    One exchange of three integers keeps the ranks together: none goes on alone after another's failure.

    Raises:
        DataError: on every rank, if the data of any failed; says which ranks, and why.
    """
    error = None
    micro_batches: list[Batch] = []
    start = time.perf_counter()
    try:
        micro_batches = next(batches)
    except StopIteration:
        return None
    except (DataError, OSError) as caught:
        error = str(caught)
    waited = time.perf_counter() - start
    own = [sum(batch.target_count for batch in micro_batches), stop, error is not None]
    targets, stops, failures = engine.sum_over_ranks(own)
    if failures:
        raise DataError(engine.errors_of_ranks(error))
    return StepBatches(micro_batches, targets, stops > 0, waited)
