"""Open the data of a run, and get the batches of the next step, or the same error, on all ranks."""

from __future__ import annotations

import contextlib
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
from dcscale.data.shards.repeated import find_repeated
from dcscale.data.storage import redact
from dcscale.files import may_succeed_later
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
    with _naming("data.sources" if config.data.sources else "data.train"):
        if config.data.sources:
            return open_mixture(config.data.sources, stream_config)
        return open_stream(config.data.train, stream_config)


def open_validation_stream(config: Config) -> SequenceStream | None:
    """Opens the validation data of a config; None if the run has no validation.

    Raises:
        DataError: the data cannot be opened.
    """
    if config.data.validation is None or config.validation.interval == 0:
        return None
    with _naming("data.validation"):
        # Validation losses are only comparable over the same sequences, so a validation shard is never skipped.
        return open_stream(config.data.validation, StreamConfig.from_config(config, shuffle=False, on_error="fail"))


@contextlib.contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Names the setting in errors of the data that it names."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{setting}: {error}") from error


def open_data(
    config: Config,
    environment: Environment,
    stream: Stream,
    validation: SequenceStream | None,
    all_shards: bool = False,
) -> RunData:
    """Prepares to read this rank's part of the training and validation data. No shards are read here.

    Args:
        config: the settings of the run.
        environment: this process.
        stream: the training data.
        validation: the validation data, if any.
        all_shards: check the existence and size of every shard, not only of this rank's share.

    Raises:
        DataError: the validation data is training data or has another tokenizer, or a file is missing.
    """
    if validation is not None:
        _check_held_out(stream, validation)
    for opened in (stream, validation) if all_shards else ():
        if opened is not None:
            opened.check_shard_files()
    loader = _loader(config, environment, stream, config.data.prefetch_steps, config.data.workers)
    # All sources of a mixture have the same tokenizer.
    source = stream.sources[0]
    return RunData(
        stream,
        loader,
        tokenizer_files(source.storage, source.manifest),
        None if validation is None else _loader(config, environment, validation, limit=config.validation.sequences),
        None if validation is None else validation.text_bytes_per_target,
        load_shard_tokenizer(source.storage, source.manifest) if config.samples.interval > 0 else None,
    )


def _check_held_out(stream: Stream, validation: SequenceStream) -> None:
    opened = [*stream.sources, *validation.sources]
    for repeated in find_repeated([(source.storage, source.manifest) for source in opened]):
        if repeated.second == len(stream.sources):
            raise DataError(
                f"data.validation: {validation.storage} is not held out, it has data in common with the training data "
                f"{opened[repeated.first].storage}: {repeated}; name other shards (tools/make_shards.py --hold-out "
                f"makes them), or set validation.interval=0"
            )
    if validation.tokenizer.fingerprint != stream.tokenizer.fingerprint:
        raise DataError(
            f"data.validation: the tokenizer of {validation.storage} has the fingerprint "
            f"{validation.tokenizer.fingerprint}, but that of the training data {stream.tokenizer.fingerprint}: token "
            f"ids would mean different text; make both with one tokenizer, or set validation.interval=0"
        )


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
        micro_batch_size=config.train.sequences_per_pass(environment.world_size),
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


class Requests(NamedTuple):
    """What a rank asks all ranks to do between two steps."""

    stop: bool = False
    """A signal was received, or the launcher was lost."""

    time_is_up: bool = False
    """``train.stop_after_minutes`` have passed, by the clock of rank 0."""

    save: bool = False
    """``checkpoint.interval_minutes`` have passed, by the clock of rank 0."""

    look: bool = False
    """Rank 0 found a request file in the run folder (:mod:`dcscale.observe.requests`)."""


@dataclass(frozen=True)
class StepBatches:
    """The input of one optimizer step."""

    micro_batches: list[Batch]
    """This rank's micro-batches, on the CPU."""

    targets: int
    """Number of target tokens with a loss in the global batch; may be 0."""

    padding: int
    """Number of inputs in the global batch that are padding."""

    requests: Requests
    """What any rank asked for."""

    wait_seconds: float
    """Seconds that this rank waited for its own micro-batches."""

    skipped: tuple[SkippedShard, ...] = ()
    """Shards that any rank skipped for the first time in this step."""


def next_step_batches(
    engine: Engine, batches: Iterator[list[Batch]], requests: Callable[[], Requests] = Requests
) -> StepBatches | None:
    """Returns the batches of the next step, or None at the end of the data, which is the same step on every rank.

    One all-reduce of a few integers keeps the ranks in step: none continues alone after a failure of another, or with a
    different list of skipped shards. A rank that is asked to stop while it waits for data gets no batches and reports
    the request instead.

    Args:
        engine: sums over the ranks.
        batches: this rank's batches of each step.
        requests: what this rank asks for; called once it has its batches.

    Raises:
        DataError: on every rank, if the data of any rank failed; names the ranks and the reasons.
    """
    error, retry = None, False
    micro_batches: list[Batch] = []
    start = time.perf_counter()
    try:
        micro_batches = next(batches)
    except StopIteration:
        return None
    except (DataError, OSError) as caught:
        error, retry = str(caught), may_succeed_later(caught)
    wait_seconds = time.perf_counter() - start
    asked = requests()
    if asked.stop:
        # A stop request interrupts the loader, which then raises: that is not a failure of the data.
        error = None
    skipped = {shard for batch in micro_batches for shard in batch.skipped}
    own_targets = sum(batch.target_count for batch in micro_batches)
    own_padding = sum(batch.padding_count for batch in micro_batches)
    failed = error is not None
    targets, padding, failures, retries, skips, *all_asked = engine.sum_over_ranks(
        [own_targets, own_padding, failed, failed and retry, len(skipped), *asked]
    )
    if failures:
        errors = {rank: text for rank, text in enumerate(engine.gather_objects(error)) if text is not None}
        text = "; ".join(f"rank {rank}: {text}" for rank, text in errors.items())
        raise DataError(text, retry=retries == failures, rank=min(errors))
    unique: dict[str, SkippedShard] = {}
    if skips:
        # Ranks may have found different defects in a shard; sorting makes all of them report the same one.
        for shard in sorted(set().union(*engine.gather_objects(skipped)), key=lambda shard: (shard.name, shard.reason)):
            unique.setdefault(shard.sha256, shard)
    agreed = Requests(*(count > 0 for count in all_asked))
    return StepBatches(micro_batches, targets, padding, agreed, wait_seconds, tuple(unique.values()))
