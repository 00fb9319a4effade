"""The data of a run, opened from its config; and the next batch on all ranks, or its failure on all ranks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from dcscale.config import Config
from dcscale.data import (
    Batch,
    BatchLoader,
    DataError,
    MixedStream,
    SequenceStream,
    SkippedShard,
    Stream,
    StreamConfig,
    Tokenizer,
    open_mixture,
    open_stream,
    tokenizer_files,
    tokenizer_of_shards,
)
from dcscale.data.storage import shown
from dcscale.parallel import Engine, Environment


class RunData(NamedTuple):
    """What a run reads."""

    stream: Stream
    loader: BatchLoader
    """This rank's training batches."""

    tokenizer_files: dict[str, bytes]
    """What is needed to load the tokenizer, by name; every checkpoint holds a copy."""

    validation: BatchLoader | None
    """This rank's held-out batches, always the same."""

    validation_bytes_per_target: float | None
    """UTF-8 bytes of held-out text a target stands for; None where the shards do not say."""

    tokenizer: Tokenizer | None
    """Loaded for samples only."""


def open_training_stream(config: Config) -> Stream:
    """The training data of a config.

    Raises:
        DataError: they cannot be opened.
    """
    stream_config = StreamConfig.of(config)
    if config.data.sources:
        return open_mixture(config.data.sources, stream_config)
    return open_stream(config.data.train, stream_config)


def open_data(config: Config, environment: Environment) -> RunData:
    """Opens what this rank reads; only manifests are read here.

    Raises:
        DataError: something cannot be opened, or does not fit the config.
    """
    stream = open_training_stream(config)
    loader = _loader(config, environment, stream, config.data.prefetch_steps, config.data.workers)
    first = stream.streams[0] if isinstance(stream, MixedStream) else stream
    held_out = _open_validation_stream(config)
    return RunData(
        stream,
        loader,
        tokenizer_files(first.source, first.manifest),
        None if held_out is None else _loader(config, environment, held_out, limit=config.validation.sequences),
        None if held_out is None else held_out.text_bytes_per_target,
        tokenizer_of_shards(first.source, first.manifest) if config.samples.interval > 0 else None,
    )


def _open_validation_stream(config: Config) -> SequenceStream | None:
    if config.data.validation is None or config.validation.interval == 0:
        return None
    # A validation loss is that of the same sequences throughout a run, so none of its shards is ever skipped.
    return open_stream(config.data.validation, StreamConfig.of(config, shuffle=False, on_error="fail"))


def _loader(
    config: Config,
    environment: Environment,
    stream: Stream,
    prefetch_steps: int = 0,
    workers: int = 0,
    limit: int | None = None,
) -> BatchLoader:
    return BatchLoader(
        stream,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        rank=environment.rank,
        world_size=environment.world_size,
        prefetch_steps=prefetch_steps,
        workers=workers,
        limit=limit,
    )


def without_secrets(config: Config) -> Config:
    """The config as it is written to disk: without the credentials that addresses of data may hold."""
    data = config.data
    sources = [dataclasses.replace(source, path=shown(source.path)) for source in data.sources]
    validation = None if data.validation is None else shown(data.validation)
    data = dataclasses.replace(data, train=shown(data.train), sources=sources, validation=validation)
    return dataclasses.replace(config, data=data)


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


def next_on_all_ranks(
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
        raise DataError(engine.gather_errors(error))
    unique: dict[str, SkippedShard] = {}
    if skips:
        # Ranks may have met different defects of a shard; all report the same one.
        for shard in sorted(set().union(*engine.gather_objects(skipped)), key=lambda shard: (shard.name, shard.reason)):
            unique.setdefault(shard.sha256, shard)
    return StepBatches(micro_batches, targets, stops > 0, waited, tuple(unique.values()))
