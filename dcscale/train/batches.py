"""The next batch on all ranks, or its failure on all ranks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dcscale.data import Batch, DataError, SkippedShard
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

    skipped: tuple[SkippedShard, ...] = ()
    """Shards that any rank has newly given up for this step."""


def next_together(
    engine: Engine, batches: Iterator[list[Batch]], stop: Callable[[], bool] = lambda: False
) -> StepBatches | None:
    """The next step's batches; None where they end, which is the same step on every rank.

    One exchange of four integers keeps the ranks together: none goes on alone after another's failure, or with other
    data than the others know of. A rank that is told to stop while it waits for its data, and so gets none, says so.

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
    stopping = stop()
    if stopping:
        error = None
    skipped = {shard for batch in micro_batches for shard in batch.skipped}
    own = [sum(batch.target_count for batch in micro_batches), stopping, error is not None, len(skipped)]
    targets, stops, failures, skips = engine.sum_over_ranks(own)
    if failures:
        raise DataError(engine.errors_of_ranks(error))
    unique: dict[str, SkippedShard] = {}
    if skips:
        # Ranks may have met different defects of a shard; all report the same one.
        for shard in sorted(set().union(*engine.of_all_ranks(skipped)), key=lambda shard: (shard.name, shard.reason)):
            unique.setdefault(shard.sha256, shard)
    return StepBatches(micro_batches, targets, stops > 0, waited, tuple(unique.values()))
