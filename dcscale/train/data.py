"""Open the data of a run, and get the batches of the next step, or the same error, on all ranks."""

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
    SequenceStream,
    SkippedShard,
    Stream,
    StreamConfig,
    Tokenizer,
    load_shard_tokenizer,
    open_mixture,
    open_stream,
    tokenizer_files,
)
from dcscale.data.storage import redact
from dcscale.parallel import Engine, Environment


class RunData(NamedTuple):
    """The data streams and tokenizer that a run reads."""

    stream: Stream
    loader: BatchLoader
    """This rank's training batches."""

    tokenizer_files: dict[str, bytes]
    """Content of the files needed to load the tokenizer, by file name; every checkpoint contains a copy."""

    validation: BatchLoader | None
    """This rank's validation batches, the same at every validation; None: no validation."""

    validation_bytes_per_target: float | None
    """Mean UTF-8 bytes of validation text per target token; None if the shards do not record it."""

    tokenizer: Tokenizer | None
    """Loaded only if the run generates samples."""


def open_training_stream(config: Config) -> Stream:
    """Opens the training data of a config: one folder of shards, or a mixture of several.

    Raises:
        DataError: the data cannot be opened.
    """
    stream_config = StreamConfig.from_config(config)
    if config.data.sources:
        return open_mixture(config.data.sources, stream_config)
    return open_stream(config.data.train, stream_config)


def open_data(config: Config, environment: Environment) -> RunData:
    """Opens all data that this rank reads. Only manifests are read here, no shards.

    Raises:
        DataError: data cannot be opened, or do not fit the config.
    """
    stream = open_training_stream(config)
    loader = _loader(config, environment, stream, config.data.prefetch_steps, config.data.workers)
    # All sources of a mixture have the same tokenizer.
    source = stream.sources[0]
    validation = _open_validation_stream(config)
    return RunData(
        stream,
        loader,
        tokenizer_files(source.storage, source.manifest),
        None if validation is None else _loader(config, environment, validation, limit=config.validation.sequences),
        None if validation is None else validation.text_bytes_per_target,
        load_shard_tokenizer(source.storage, source.manifest) if config.samples.interval > 0 else None,
    )


def _open_validation_stream(config: Config) -> SequenceStream | None:
    if config.data.validation is None or config.validation.interval == 0:
        return None
    # Validation losses are only comparable over the same sequences, so a validation shard is never skipped.
    return open_stream(config.data.validation, StreamConfig.from_config(config, shuffle=False, on_error="fail"))


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
    """Returns the config as it is written to disk: without credentials in the URLs of data."""
    data = config.data
    sources = [dataclasses.replace(source, path=redact(source.path)) for source in data.sources]
    validation = None if data.validation is None else redact(data.validation)
    data = dataclasses.replace(data, train=redact(data.train), sources=sources, validation=validation)
    return dataclasses.replace(config, data=data)


@dataclass(frozen=True)
class StepBatches:
    """The input of one optimizer step."""

    micro_batches: list[Batch]
    """This rank's micro-batches, on the CPU."""

    targets: int
    """Number of target tokens with a loss in the global batch."""

    stop: bool
    """Whether any rank received a request to stop."""

    wait_seconds: float
    """Seconds that this rank waited for its own micro-batches."""

    skipped: tuple[SkippedShard, ...] = ()
    """Shards that any rank skipped for the first time in this step."""


def next_step_batches(
    engine: Engine, batches: Iterator[list[Batch]], stop: Callable[[], bool] = lambda: False
) -> StepBatches | None:
    """Returns the batches of the next step, or None at the end of the data, which is the same step on every rank.

    One all-reduce of four integers keeps the ranks in step: none continues alone after a failure of another, or with a
    different list of skipped shards. A rank that is asked to stop while it waits for data gets no batches and reports
    the request instead.

    Raises:
        DataError: on every rank, if the data of any rank failed; names the ranks and the reasons.
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
    wait_seconds = time.perf_counter() - start
    stopping = stop()
    if stopping:
        # A stop request interrupts the loader, which then raises: that is not a failure of the data.
        error = None
    skipped = {shard for batch in micro_batches for shard in batch.skipped}
    own = [sum(batch.target_count for batch in micro_batches), stopping, error is not None, len(skipped)]
    targets, stops, failures, skips = engine.sum_over_ranks(own)
    if failures:
        raise DataError(engine.gather_errors(error))
    unique: dict[str, SkippedShard] = {}
    if skips:
        # Ranks may have found different defects in a shard; sorting makes all of them report the same one.
        for shard in sorted(set().union(*engine.gather_objects(skipped)), key=lambda shard: (shard.name, shard.reason)):
            unique.setdefault(shard.sha256, shard)
    return StepBatches(micro_batches, targets, stops > 0, wait_seconds, tuple(unique.values()))
