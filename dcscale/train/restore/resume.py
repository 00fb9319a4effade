"""Find the checkpoint that a run resumes from, and check that it is compatible with the config and the data."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import (
    OPTIMIZER,
    WEIGHTS,
    corrupt_reason,
    incomplete_reason,
    read_state,
    step_of,
)
from dcscale.config import Config, differences
from dcscale.config.errors import show
from dcscale.data import Stream
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.parallel import broadcast_from_rank0, gather_objects, run_on_all_ranks
from dcscale.train.state import TrainState

COMPUTE_ONLY_MODEL_FIELDS = ("model.backend", "model.scratch_mib")
"""Fields of the model section that decide how the model is computed, not what; they may change on a resume."""

_HYPERPARAMETERS = ("optimizer", "schedule", "train.steps", "train.gradient_clipping")
"""Sections and fields that may change on a resume, too, but affect the weights, so changes are reported."""


def find_resumable_checkpoint(
    config: Config, rank: int, ranks: int, verify: bool = True
) -> tuple[Path | None, dict[Path, str]]:
    """Finds the checkpoint to resume from and verifies its checksums; all ranks call it together.

    Every rank reads a share of the files, unless ``verify`` is false, which compares sizes only. With
    ``checkpoint.on_corrupt=previous``, corrupt checkpoints of the run are passed over in favour of the previous one.

    Returns:
        The checkpoint, or None for a new run; and the corrupt checkpoints that were passed over, with their problems.

    Raises:
        CheckpointError: as :func:`checkpoint_to_resume`, or the checkpoint is corrupt, or the disk fails.
        RankError: on the ranks where reading succeeded, if the disk fails on another.
    """
    # A resume does not read WEIGHTS: the engine takes the optimizer's float32 weights.
    check = partial(corrupt_reason, skip=WEIGHTS, rank=rank, ranks=ranks) if verify else incomplete_reason
    corrupt: dict[Path, str] = {}
    while True:
        checkpoint = broadcast_from_rank0(lambda: checkpoint_to_resume(config, corrupt))
        if checkpoint is None:
            return None, corrupt
        problems = gather_objects(run_on_all_ranks(partial(check, checkpoint)))
        problem = next((text for text in problems if text is not None), None)
        if problem is None:
            return checkpoint, corrupt
        if not _is_of_run(checkpoint, config):
            raise CheckpointError(f"the checkpoint to resume from is corrupt: {problem}; name another one")
        if config.checkpoint.on_corrupt == "fail":
            raise CheckpointError(
                f"the newest checkpoint is corrupt: {problem}. Restore it from a copy, or set "
                "checkpoint.on_corrupt=previous to quarantine it and resume from the newest intact one"
            )
        corrupt[checkpoint] = problem


def _is_of_run(checkpoint: Path, config: Config) -> bool:
    """Whether the checkpoint is one of the run itself, not of a run that it branches from."""
    # Resolve both, as the run's checkpoints folder may be a link to another disk.
    return checkpoint.resolve().parent == (Path(config.run.folder) / "checkpoints").resolve()


def checkpoint_to_resume(config: Config, corrupt: Mapping[Path, str] | None = None) -> Path | None:
    """The checkpoint that ``checkpoint.resume`` and the run folder select, or None for a new run. It is not verified.

    Args:
        config: the settings of the run.
        corrupt: checkpoints that are known to be corrupt, with their problems; none of them is returned.

    Raises:
        CheckpointError: the run folder and ``checkpoint.resume`` contradict each other, or all checkpoints of the run
            are corrupt.
    """
    run, resume = Path(config.run.folder), config.checkpoint.resume
    corrupt = corrupt or {}
    existing = [checkpoint for checkpoint in checkpoints_of(run) if checkpoint not in corrupt]
    if resume == "never":
        if existing or (run / "metrics.jsonl").exists():
            raise CheckpointError(
                f"run.folder {run} already contains a run and checkpoint.resume is 'never': use another run.name or "
                "run.folder, or checkpoint.resume=auto to resume it"
            )
        return None
    if resume == "auto":
        if corrupt and not existing:
            raise CheckpointError(
                f"all checkpoints in {run} are corrupt; the newest: {next(iter(corrupt.values()))}. Restore one from "
                "a copy, or start a new run with another run.name or run.folder"
            )
        return existing[-1] if existing else None
    try:
        checkpoint = find_checkpoint(Path(resume))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.resume: {error}; or use auto or never") from error
    if checkpoint in corrupt:
        raise CheckpointError(f"checkpoint.resume names a corrupt checkpoint: {corrupt[checkpoint]}; name another one")
    if not (checkpoint / OPTIMIZER).is_dir():
        raise CheckpointError(
            f"checkpoint.resume is {checkpoint}, which contains a model without optimizer state ({OPTIMIZER}/): "
            "training cannot resume from it; name a checkpoint that a run has written"
        )
    if existing:
        newest = existing[-1]
        # The same command, started again, resumes the branch instead of branching off once more.
        if incomplete_reason(newest) or read_state(newest).get("branched_from") == str(checkpoint.resolve()):
            return newest
    newer = [p.name for p in existing if step_of(p) > step_of(checkpoint)]
    if newer:
        raise CheckpointError(
            f"checkpoint.resume is {checkpoint}, but run.folder {run} has newer checkpoints, up to {newer[-1]}: use "
            "another run.name or run.folder to branch off, or delete the newer checkpoints"
        )
    return checkpoint


def data_changes(saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """Describes each difference between two data identities, of a checkpoint and of the data as they are now."""
    return [
        f"the data's {key} was {saved.get(key)!r} in the checkpoint and is {current.get(key)!r} now: "
        "the sequences would differ"
        for key in {**saved, **current}
        if saved.get(key) != current.get(key)
    ]


def topology_changes(content: dict[str, Any], config: Config, world_size: int) -> list[str]:
    """Describes each change of rank count, ZeRO stage and precision since the checkpoint. All of them are allowed."""
    settings = {
        "ranks": ("world_size", world_size),
        "parallel.zero_stage": ("zero_stage", config.parallel.zero_stage),
        "train.precision": ("precision", config.train.precision),
    }
    return [
        f"{name} was {content[key]} in the checkpoint and is {current} now; the saved state is float32 and independent "
        "of ranks and ZeRO stage"
        for name, (key, current) in settings.items()
        if content[key] != current
    ]


def hyperparameter_changes(saved_config: Config, config: Config) -> list[str]:
    """Describes each changed setting of optimizer, schedule and update since the checkpoint. All are allowed."""
    return [
        f"{path} was {show(saved)} in the checkpoint and is {show(current)} now"
        for path, saved, current in differences(saved_config, config)
        if path in _HYPERPARAMETERS or path.partition(".")[0] in _HYPERPARAMETERS
    ]


def init_from_changes(initial_weights: str | None, init_from: str | None) -> list[str]:
    """Describes the change if a resumed run was started from other weights than ``checkpoint.init_from`` names now.

    Args:
        initial_weights: the source recorded in the run's state; None: random weights.
        init_from: the current ``checkpoint.init_from``.
    """
    if init_from is None:
        return []
    if initial_weights is not None:
        # init_from may also name a run folder, whose newest checkpoint was the source.
        recorded = Path(initial_weights)
        if Path(init_from).resolve() in (recorded, *recorded.parents):
            return []
    source = "random weights" if initial_weights is None else f"the weights of {initial_weights}"
    return [f"this run was started from {source}; checkpoint.init_from has no effect on a resume"]


def restore_state(
    checkpoint: Path, content: dict[str, Any], saved_config: Config, config: Config, ranks: int, stream: Stream | None
) -> tuple[TrainState, list[str]]:
    """The state to resume with, and a console line for each change since the checkpoint.

    Without ``stream``, only the config is compared.

    Raises:
        CheckpointError: as :func:`check_compatible`.
    """
    if stream is None:
        return check_compatible(checkpoint, content, saved_config, config), []
    state = check_compatible(checkpoint, content, saved_config, config, stream.identity, stream.tokenizer)
    allowed = [*topology_changes(content, config, ranks), *hyperparameter_changes(saved_config, config)]
    of_data = data_changes(state.data_identity, stream.identity)
    state.data_identity = stream.identity
    if "padding_tokens" not in content and (stream.has_packed_rows or state.skipped):
        allowed.append(
            f"with padding in the token count of the {state.step} steps so far, as the checkpoint counted it"
        )
    return state, [
        *(f"resuming   {change}" for change in allowed),
        *(f"warning    {change} (checkpoint.allow_data_change=true)" for change in of_data),
        *(f"warning    {change}" for change in init_from_changes(state.initial_weights, config.checkpoint.init_from)),
    ]


def check_compatible(
    checkpoint: Path,
    content: dict[str, Any],
    saved_config: Config,
    config: Config,
    identity: dict[str, Any] | None = None,
    tokenizer: TokenizerInfo | None = None,
) -> TrainState:
    """Checks that a run can resume from a checkpoint, and returns its state.

    Args:
        checkpoint: the checkpoint folder.
        content: its ``state.json``.
        saved_config: its ``config.yaml``.
        config: the settings of the run.
        identity: of the training data. May differ with ``checkpoint.allow_data_change``. None is not compared.
        tokenizer: of the training data. Must not differ. None is not compared.

    Raises:
        CheckpointError: model, global batch size or data differ, or the checkpoint is beyond ``train.steps``; lists
            all differences.
    """
    problems = [
        f"{path} is {show(saved)} in the checkpoint and {show(current)} now: this changes the model"
        for path, saved, current in differences(saved_config, config)
        if path.startswith("model.") and path not in COMPUTE_ONLY_MODEL_FIELDS
    ]
    saved, current, way_out = content["global_batch_size"], config.train.global_batch_size, ""
    if saved != current:
        problems.append(
            f"train.global_batch_size is {saved} in the checkpoint and {current} now: it must match to resume"
        )
        way_out = f", which checkpoint.init_from={checkpoint} starts with these weights"
    state = TrainState.from_json(content)
    if state.scratch_mib is None:  # a checkpoint from before scratch was part of the state
        state.scratch_mib = saved_config.model.scratch_mib
    changes = [] if identity is None else data_changes(state.data_identity, identity)
    if changes and not config.checkpoint.allow_data_change:
        problems += changes
        way_out += ", or set checkpoint.allow_data_change=true to continue with other sequences"
    elif changes and tokenizer is not None and content["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        problems.append("the data have another tokenizer: token ids would decode to different text")
    if not _is_of_run(checkpoint, config):
        state.branched_from = str(checkpoint.resolve())
    if state.step > config.train.steps:
        problems.append(f"it is at step {state.step}, past train.steps {config.train.steps}")
    if problems:
        raise CheckpointError(
            f"cannot resume from {checkpoint}: " + "; ".join(problems) + ". Restore these settings, or start a new "
            f"run with another run.name or run.folder{way_out}"
        )
    return state
