"""Build a trainer from a config: data, start, engine, hooks, reporter."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.checkpointer import point_latest_at, quarantine
from dcscale.checkpoint.layout import STATE
from dcscale.checkpoint.probe import read_probe
from dcscale.cluster.ending import Ending
from dcscale.cluster.watchdog import Watchdog, start_watchdog
from dcscale.config import Config, to_yaml
from dcscale.doctor.start import check_nodes
from dcscale.files import write_atomically
from dcscale.lease import Lease, LeaseTimes, this_process
from dcscale.models import DCFormer, count_parameters, initialize
from dcscale.observe import Console
from dcscale.observe.events import EventFile, event_path
from dcscale.observe.reporter import Reporter
from dcscale.ops.compose.scratch import derived_scratch_bytes, total_memory
from dcscale.parallel import (
    Engine,
    Environment,
    broadcast_from_rank0,
    current_rendezvous,
    gather_objects,
    launch_line,
    run_on_all_ranks,
    set_timeouts,
)
from dcscale.train.advice import advice
from dcscale.train.data import without_secrets
from dcscale.train.optimizer import build_optimizer
from dcscale.train.preflight import preflight, run_folder_errors
from dcscale.train.restore.start import Start
from dcscale.train.summary import print_banner
from dcscale.train.trainer import Trainer


def build_trainer(config: Config, environment: Environment, console: Console, ending: Ending | None = None) -> Trainer:
    """Builds everything a run needs on this rank; all ranks call it together, after ``start_distributed``.

    ``config`` must have passed :func:`dcscale.config.check_config`. ``ending`` learns what this start holds, has the
    output of this process written to its log, and ends it if the run hangs; None: the process goes on after the run,
    as in tests.

    First of all rank 0 takes the lease of the run folder, which :meth:`Trainer.close` releases.

    Raises:
        LeaseHeldError: another start of the run holds the folder; nothing has been written.
        DataError, CheckpointError, RuleError, RankError: the data, the checkpoint or the optimizer rules do not fit the
            config, on this rank or on another. Unless it is the probe of a resumed checkpoint that differs, nothing
            has been written by then. CheckpointError also if the run folder cannot be written to.
        PreflightError: several of these.
        NodeCheckError: a node would end the run later.
    """
    lease = _take_run_folder(config, environment, console, ending)
    watchdog = None
    if ending is not None:
        watchdog = start_watchdog(config.parallel, environment, ending)
    try:
        return _build(config, environment, console, ending, lease, watchdog)
    except BaseException:
        if lease is not None and ending is None:  # which releases it when it has written how this start ended
            lease.release()
        raise


def _build(
    config: Config,
    environment: Environment,
    console: Console,
    ending: Ending | None,
    lease: Lease | None,
    watchdog: Watchdog | None,
) -> Trainer:
    data, start, hooks = preflight(config, environment).result()
    if config.parallel.check_nodes:
        # A run that is complete writes no checkpoint.
        count = count_parameters(config.model).total if start.state.step < config.train.steps else None
        check_nodes(config, environment, lease, current_rendezvous().hosts, count)
    memories = gather_objects(total_memory(environment.device.type, environment.device.index))
    warnings = [
        *data.stream.warnings,
        *advice(config, environment.world_size, data.stream, _smallest(memories), start.state.passed_over_sequences),
    ]
    for message in (*(f"warning    {text}" for text in warnings), *start.messages):
        console.line(message)
    start.state.scratch_mib, message = choose_scratch(config, start.state.scratch_mib, memories)
    if config.model.attention == "dcmha":
        console.line(message)
    engine = Engine(
        config,
        environment,
        build_model=lambda: _build_model(config, start.state.scratch_mib),
        initialize=lambda model, gather: initialize(model, config.model, config.train.seed, gather=gather),
        build_optimizer=lambda model: build_optimizer(
            model, config.optimizer, fused=environment.device.type == "cuda" or config.parallel.offload_optimizer
        ),
    )
    if start.saved is not None:
        engine.load(start.saved)
    run = Path(config.run.folder)
    for message in broadcast_from_rank0(lambda: _prepare_run_folder(run, config, start, lease)):
        console.line(message)
    if ending is not None:
        run_on_all_ranks(lambda: _open_log(run, ending))
    reporter = run_on_all_ranks(lambda: _open_reporter(run, start.state.step, config, console, lease))
    # On the other ranks, the console is silent.
    events = EventFile(event_path(run, environment.rank), reporter.warn if environment.is_main else _warn_in_log)
    trainer = Trainer(
        config,
        engine,
        data.loader,
        start.state,
        reporter,
        events,
        hooks,
        run,
        data.tokenizer_files,
        start.checkpoint,
        lease=lease,
        watchdog=watchdog,
    )
    if watchdog is not None:
        watchdog.on_stacks = lambda folder: events.write("stacks", step=trainer.state.step, folder=folder)
    if ending is not None:
        ending.progress = lambda: (trainer.state.step, trainer.latest_checkpoint)
        ending.before_exit = lambda: _close_files(ending, trainer)
    console.line(launch_line(environment, current_rendezvous().hosts))
    print_banner(console, trainer, data.stream)
    if start.checkpoint is not None:
        _check_probe(trainer, start.checkpoint, console)
    events.write(
        "start",
        step=start.state.step,
        checkpoint=None if start.checkpoint is None else str(start.checkpoint),
        host=socket.gethostname(),
        pid=os.getpid(),
        world_size=environment.world_size,
    )
    return trainer


def _warn_in_log(text: str) -> None:
    print(f"warning    {text}", file=sys.stderr)


def _close_files(ending: Ending, trainer: Trainer) -> None:
    trainer.events.write("ending", code=ending.code, reason=ending.reason, step=trainer.state.step)
    trainer.close_files()


def _smallest(memories: Sequence[int | None]) -> int | None:
    """Total memory of the smallest device in bytes; None for CPUs."""
    return None if None in memories else min(memories)


def choose_scratch(config: Config, stored_mib: int | None, memories: Sequence[int | None]) -> tuple[int, str]:
    """Scratch memory of an attention call in MiB, the same on all ranks, and a console line that names its origin.

    Args:
        config: the settings of the run; ``model.scratch_mib`` wins if it is set.
        stored_mib: what the checkpoint to resume from was trained with, which comes next; None for a new run.
        memories: total memory of each rank's device in bytes; None for a CPU.
    """
    model = config.model
    if model.scratch_mib is not None:
        mib, origin = model.scratch_mib, "model.scratch_mib"
    elif stored_mib is not None:
        mib, origin = stored_mib, "as in the checkpoint; model.scratch_mib changes it"
    else:
        memory = _smallest(memories)
        shapes = {
            "batch": config.train.micro_batch_size,
            "queries": config.data.sequence_length,
            "keys": config.data.sequence_length,
            "heads": model.heads,
            "element_size": 2 if config.train.precision == "bf16" else 4,
        }
        mib = max(derived_scratch_bytes(memory, window=window, **shapes) for window in model.windows) // 2**20
        source = "the default on a CPU" if memory is None else f"from the shapes and {memory / 2**30:.1f} GiB a device"
        origin = f"{source}; model.scratch_mib changes it"
    return mib, f"scratch    {mib:,} MiB for an attention call ({origin})"


def _build_model(config: Config, scratch_mib: int) -> nn.Module:
    # The config of the run keeps what the user wrote, so that null means the same in a run that starts from it.
    settings = replace(config.model, scratch_mib=scratch_mib)
    model = DCFormer(settings, recompute=config.train.recompute, loss_chunk=config.train.loss_chunk)
    if config.train.compile:
        model.compile_blocks()
    return model


def _take_run_folder(config: Config, environment: Environment, console: Console, ending: Ending | None) -> Lease | None:
    """Takes the lease of the run folder on rank 0; returns it there, and None on the other ranks.

    Raises:
        LeaseHeldError: another start of the run holds it.
        CheckpointError: the folder cannot be written to.
    """
    run = Path(config.run.folder)
    way_out = "stop that process, or wait until it ends; another run needs another run.folder"
    lease = Lease(run, way_out, this_process(environment.launch.launcher), console.line)
    if ending is not None and environment.is_main:
        ending.lease = lease  # a signal may come while it is being taken

    def acquire() -> str:
        with run_folder_errors(run):
            lease.acquire()
            if ending is not None:
                ending.hold(run, lease.token)  # now, so that no other rank sees how an earlier start ended
        return lease.token

    # The others wait for rank 0, which may wait for another start.
    set_timeouts(max(60 * config.parallel.start_timeout_minutes, 2 * LeaseTimes.expire))
    token = broadcast_from_rank0(acquire)
    if ending is not None:
        ending.hold(run, token)
    return lease if environment.is_main else None


def _prepare_run_folder(run: Path, config: Config, start: Start, lease: Lease) -> list[str]:
    """Writes the config and quarantines corrupt checkpoints; returns a console line for each of these.

    Raises:
        CheckpointError: the folder cannot be written to.
        LeaseLostError: another start of the run has taken it over.
    """
    with run_folder_errors(run):
        lease.check()
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_atomically(run / "config.yaml", to_yaml(without_secrets(config)))
        moved = [(quarantine(checkpoint), problem) for checkpoint, problem in start.corrupt.items()]
        if moved and start.checkpoint is not None:
            point_latest_at(start.checkpoint)
    return [f"warning    {problem}; the checkpoint was quarantined as {place}" for place, problem in moved]


def _open_log(run: Path, ending: Ending) -> None:
    """Has this rank print into its log. Raises CheckpointError if that cannot be written."""
    with run_folder_errors(run):
        ending.open_log()


def _open_reporter(run: Path, last_step: int, config: Config, console: Console, lease: Lease | None) -> Reporter:
    """Opens the metrics on rank 0, which has the lease.

    Raises:
        CheckpointError: they cannot be written.
        LeaseLostError: another start of the run has taken the folder over.
    """
    with run_folder_errors(run):
        if lease is None:
            return Reporter(run, last_step, config.train.steps, console, config.log.progress, is_main=False)
        return Reporter(run, last_step, config.train.steps, console, config.log.progress, True, lease.check)


def _check_probe(trainer: Trainer, checkpoint: Path, console: Console) -> None:
    """Compares the logits of the loaded model with those saved in the checkpoint.

    Raises:
        CheckpointError: they differ by more than rounding, with the same dtype on the same kind of device.
    """
    saved = run_on_all_ranks(lambda: read_probe(checkpoint))
    if saved is None:
        console.line(f"warning    {checkpoint} has no probe batch, so the logits of the loaded model were not checked")
        return
    current = trainer.probe((saved.input_ids_BT, saved.positions_B))
    problems = [text for text in trainer.engine.gather_objects(saved.difference(current)) if text is not None]
    if not problems:
        return
    problem = f"{problems[0]}, on {len(problems)} of {trainer.environment.world_size} ranks"
    if saved.comparable(current) and not trainer.config.checkpoint.allow_other_logits:
        raise CheckpointError(
            f"{checkpoint} was loaded, but its model does not compute the logits it had when it was saved: {problem}. "
            f"Resume with the code that wrote it (see {STATE}), or, if the change is intended, set "
            "checkpoint.allow_other_logits=true"
        )
    console.line(f"warning    {checkpoint}: {problem}")
