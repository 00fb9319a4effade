"""From a config to a trainer that is ready to run: data, model, engine, hooks, and the checkpoint to go on from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.contents import read_state
from dcscale.checkpoint.fragments import Fragments
from dcscale.checkpoint.layout import OPTIMIZER, STATE
from dcscale.checkpoint.lifecycle import point_latest_at, set_aside
from dcscale.checkpoint.probe import read_probe
from dcscale.config import Config, to_yaml
from dcscale.data import (
    Access,
    BatchLoader,
    MixedStream,
    Patience,
    Stream,
    open_mixture,
    open_stream,
    tokenizer_files,
    tokenizer_of_shards,
)
from dcscale.data.sources import shown
from dcscale.files import write_atomically
from dcscale.models import DCFormer, count_flops, count_parameters, initialize
from dcscale.observe import Console
from dcscale.parallel import Engine, Environment, decided_by_main, on_every_rank
from dcscale.parallel.deepspeed_config import accumulation_steps
from dcscale.train.beginning import beginning_changes, initial_weights
from dcscale.train.hooks import (
    ComposeDistance,
    DataEpochs,
    Hook,
    Samples,
    Saving,
    SkippedData,
    Throughput,
    Validation,
    peak_tflops,
)
from dcscale.train.optimizer import build_optimizer
from dcscale.train.report import Reporter, without_secrets
from dcscale.train.resume import check_fits, course_changes, data_changes, good_checkpoint_to_resume, spread_changes
from dcscale.train.state import TrainState
from dcscale.train.trainer import Trainer


def build_trainer(config: Config, environment: Environment, console: Console) -> Trainer:
    """Builds everything on this rank; all ranks call it together, after ``start_distributed``.

    ``config`` must have passed :func:`dcscale.config.check_config`.

    Raises:
        DataError, CheckpointError, RuleError, RankError: the data, the checkpoint or the optimizer's rules do not
            fit, on this rank or on another; nothing has been written then.
        ConfigError: the run's folder cannot be written to.
    """
    run = Path(config.run.folder)
    data = on_every_rank(lambda: _open_data(config, environment))
    stream = data.stream

    # Everything that can be refused is refused before the model takes its memory and the folder is touched.
    checkpoint, damaged = good_checkpoint_to_resume(config, environment.rank, environment.world_size)
    state, saved = TrainState(data_identity=stream.identity), None
    if checkpoint is not None:
        content = decided_by_main(lambda: read_state(checkpoint))
        state = decided_by_main(lambda: check_fits(checkpoint, content, config, stream.identity, stream.tokenizer))
        saved = on_every_rank(lambda: Fragments(checkpoint / OPTIMIZER))
        changes = spread_changes(content, config, environment.world_size)
        for change in [*changes, *decided_by_main(lambda: course_changes(checkpoint, config))]:
            console.line(f"resuming   {change}")
        for change in data_changes(state.data_identity, stream.identity):
            console.line(f"warning    {change}, as checkpoint.allow_data_change lets them be")
        state.data_identity = stream.identity
        data.loader.skip([shard["sha256"] for shard in state.skipped])
        for warning in beginning_changes(state.initial_weights, config.checkpoint.init_from):
            console.line(f"warning    {warning}")
    elif config.checkpoint.init_from is not None:
        ranks = (environment.rank, environment.world_size)
        saved = on_every_rank(lambda: initial_weights(config, stream.tokenizer, *ranks))
        state.initial_weights = str(saved.source.resolve())
        console.line(f"beginning  with the weights of {saved.source}")
        for warning in saved.warnings:
            console.line(f"warning    {warning}")
    engine = Engine(
        config,
        environment,
        build_model=lambda: _build_model(config),
        initialize=lambda model, gather: initialize(model, config.model, config.train.seed, gather=gather),
        build_optimizer=lambda model: build_optimizer(
            model, config.optimizer, fused=environment.device.type == "cuda" or config.parallel.offload_optimizer
        ),
    )
    if saved is not None:
        engine.load(saved)

    for place, problem in decided_by_main(lambda: _start_folder(run, config, checkpoint, damaged)):
        console.line(f"warning    {problem}; the checkpoint is set aside as {place}")
    hooks: list[Hook] = [
        Throughput(
            count_flops(config.model, config.data.sequence_length).total,
            peak_tflops(environment.device, config.train.precision, config.log.peak_tflops),
        ),
        DataEpochs(),
        SkippedData(),
    ]
    if data.validation is not None:
        hooks.append(data.validation)
    if config.model.attention == "dcmha" and config.log.compose_interval > 0:
        hooks.append(ComposeDistance(config.log.compose_interval))
    if data.samples is not None:
        hooks.append(data.samples)
    hooks.append(Saving(config.checkpoint.interval, config.checkpoint.on_error))
    for hook in hooks:
        if hook.name in state.hooks:
            hook.load_state_dict(state.hooks[hook.name])

    reporter = on_every_rank(lambda: _open_reporter(run, state.step, config, console, environment.is_main))
    trainer = Trainer(
        config,
        engine,
        data.loader,
        state,
        reporter,
        hooks,
        run,
        data.tokenizer_files,
        checkpoint,
    )
    _announce(console, config, environment, stream, trainer)
    if checkpoint is not None:
        _check_probe(trainer, checkpoint, console)
    return trainer


def _check_probe(trainer: Trainer, checkpoint: Path, console: Console) -> None:
    saved = on_every_rank(lambda: read_probe(checkpoint))
    if saved is None:
        console.line(f"warning    {checkpoint} has no probe batch, so what its model computes was not checked")
        return
    here = trainer.probe((saved.input_ids_BT, saved.positions_B))
    problems = [text for text in trainer.engine.of_all_ranks(saved.difference(here)) if text is not None]
    if not problems:
        return
    said = f"{problems[0]}, on {len(problems)} of {trainer.environment.world_size} ranks"
    if saved.comparable(here) and not trainer.config.checkpoint.allow_other_logits:
        raise CheckpointError(
            f"{checkpoint} was loaded, but its model does not compute what it did when it was saved: {said}. Go on "
            f"with the code that wrote it ({STATE} names it), or, if the change is meant, set "
            "checkpoint.allow_other_logits=true"
        )
    console.line(f"warning    {checkpoint}: {said}")


class _Data(NamedTuple):
    stream: Stream
    loader: BatchLoader
    tokenizer_files: dict[str, bytes]
    validation: Validation | None
    samples: Samples | None


def open_training_stream(config: Config) -> Stream:
    """The training data of a config.

    Raises:
        DataError: they cannot be opened.
    """
    skip = {"on_error": config.data.on_error, "max_skipped": config.data.max_skipped}
    if config.data.sources:
        return open_mixture(config.data.sources, **_stream_settings(config), **skip)
    return open_stream(config.data.train, **_stream_settings(config), **skip)


def _open_data(config: Config, environment: Environment) -> _Data:
    stream = open_training_stream(config)
    loader = _loader(config, environment, stream, config.data.prefetch_steps, config.data.workers)
    first = stream.streams[0] if isinstance(stream, MixedStream) else stream
    validation = None
    if config.data.validation is not None and config.validation.interval > 0:
        # Its loss must always be that of the same sequences, so no shard of it is ever skipped.
        held_out = open_stream(config.data.validation, shuffle=False, **_stream_settings(config))
        validation = Validation(
            _loader(config, environment, held_out, prefetch_steps=0, limit=config.validation.sequences),
            config.validation.interval,
            held_out.text_bytes_per_target,
        )
    samples = None
    if config.samples.interval > 0:
        samples = Samples(config.samples, tokenizer_of_shards(first.source, first.manifest), config.train.seed)
    return _Data(stream, loader, tokenizer_files(first.source, first.manifest), validation, samples)


def _stream_settings(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "vocab_size": config.model.vocab_size,
        "sequence_length": data.sequence_length,
        "seed": config.train.seed,
        "shuffle_shards": data.shuffle_shards,
        "slots": data.slots,
        "document_mask": data.document_mask,
        "verify": data.verify,
        "read_ahead": data.read_ahead,
        "read_threads": data.read_threads,
        "access": Access(
            Patience(timeout=data.timeout_seconds, wait=data.retry_seconds, give_up=data.give_up_seconds),
            cache=None if data.cache is None else Path(data.cache),
            cache_bytes=data.cache_bytes,
        ),
    }


def _loader(
    config: Config,
    environment: Environment,
    stream: Stream,
    prefetch_steps: int,
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


def _start_folder(
    run: Path, config: Config, checkpoint: Path | None, damaged: dict[Path, str]
) -> list[tuple[Path, str]]:
    """Returns where damaged checkpoints are now, and what is wrong with them.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    with _written_to(run):
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(run / "config.yaml", to_yaml(without_secrets(config)))
        moved = [(set_aside(other), problem) for other, problem in damaged.items()]
        if moved and checkpoint is not None:
            point_latest_at(checkpoint)
    return moved


def _open_reporter(run: Path, last_step: int, config: Config, console: Console, is_main: bool) -> Reporter:
    """Raises CheckpointError if the run's metrics cannot be written."""
    with _written_to(run):
        return Reporter(run, last_step, config.train.steps, console, config.log.progress, is_main)


@contextlib.contextmanager
def _written_to(run: Path) -> Iterator[None]:
    """Says of which setting a failure speaks."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: metrics.jsonl is not of a run
        raise CheckpointError(f"run.folder {run} cannot be used: {error}; name another folder") from error


def _build_model(config: Config) -> nn.Module:
    model = DCFormer(config.model, recompute=config.train.recompute, loss_chunk=config.train.loss_chunk)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    return model


def _announce(console: Console, config: Config, environment: Environment, stream: Stream, trainer: Trainer) -> None:
    """Says what is about to run, with everything that was derived."""
    parameters = count_parameters(config.model)
    on_gpu = environment.device.type == "cuda"
    device = torch.cuda.get_device_name() if on_gpu else f"CPU with {torch.get_num_threads()} threads"
    model = "DCFormer" if config.model.attention == "dcmha" else "Transformer"
    console.line(f"model      {model}, {parameters.total:,} parameters ({parameters.compose:,} of compose)")
    for name, why in trainer.engine.module.implementations(environment.device):
        console.line(f"attention  {name}: {why}")
    console.line(
        f"ranks      {environment.world_size} x {device}, ZeRO-{config.parallel.zero_stage}, {config.train.precision}"
    )
    console.line(
        f"batch      {config.train.global_batch_size} sequences of {config.data.sequence_length} tokens = "
        f"{trainer.tokens_per_step:,} tokens a step; {config.train.micro_batch_size} a rank at once, "
        f"{accumulation_steps(config, environment.world_size)} times"
    )
    epochs = stream.epochs(config.train.steps * config.train.global_batch_size)
    tokens = f"{config.train.steps} steps, {config.train.steps * trainer.tokens_per_step:,} tokens"
    if isinstance(stream, MixedStream):
        console.line(f"run        {tokens}")
        for source, share in zip(config.data.sources, stream.shares):
            console.line(
                f"mixture    {share:.2%} {source.name}, {epochs[source.name]:.2f} epochs of {shown(source.path)}"
            )
    else:
        console.line(f"run        {tokens}, {epochs['']:.2f} epochs of {shown(config.data.train)}")
    console.line(f"folder     {trainer.run}")
    if trainer.latest_checkpoint is not None:
        console.line(
            f"resuming   from {trainer.latest_checkpoint}, with sequence {trainer.state.sequences:,} of data "
            f"{stream.fingerprint}"
        )
