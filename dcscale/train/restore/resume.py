"""Whether a run starts anew or goes on, and from where; and whether the checkpoint belongs to this run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import (
    OLD_OPTIMIZER,
    OPTIMIZER,
    WEIGHTS,
    corrupt_reason,
    incomplete_reason,
    read_config,
    read_state,
    step_of,
)
from dcscale.config import Config, differences
from dcscale.config.errors import show
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.parallel import broadcast_from_rank0, gather_objects
from dcscale.train.state import TrainState

MODEL_FIELDS_WITHOUT_WEIGHT = ("model.backend", "model.scratch_mib")
"""Fields of the model section that may change between starts of a run."""

_COURSE = ("optimizer", "schedule", "train.steps", "train.gradient_clipping")
"""Settings that may change too, but decide the weights: a run that goes on says what was changed of them."""


def find_resumable_checkpoint(config: Config, rank: int, ranks: int) -> tuple[Path | None, dict[Path, str]]:
    """The checkpoint this start goes on from, read and found undamaged, or None for a new run; all ranks call it.

    Every rank reads a share of the files. With ``checkpoint.on_corrupt=previous`` newer checkpoints of the run that are
    damaged are passed over, and returned with what is wrong with them.

    Raises:
        CheckpointError: as :func:`checkpoint_to_resume`, or the checkpoint is damaged.
    """
    damaged: dict[Path, str] = {}
    while True:
        checkpoint = broadcast_from_rank0(lambda: checkpoint_to_resume(config, damaged))
        if checkpoint is None:
            return None, damaged
        # Training reads everything but the weights, which are made of the optimizer's float32 ones.
        problems = gather_objects(corrupt_reason(checkpoint, left_out=WEIGHTS, rank=rank, ranks=ranks))
        problem = next((text for text in problems if text is not None), None)
        if problem is None:
            return checkpoint, damaged
        if not _is_of_run(checkpoint, config):
            raise CheckpointError(f"the checkpoint to go on from is damaged: {problem}; name another one")
        if config.checkpoint.on_corrupt == "fail":
            raise CheckpointError(
                f"the newest checkpoint is damaged: {problem}. Restore it from a copy, or set "
                "checkpoint.on_corrupt=previous to set it aside and go on from the newest good one"
            )
        damaged[checkpoint] = problem


def _is_of_run(checkpoint: Path, config: Config) -> bool:
    """Whether it lies among the run's own; their folder may be a link to another disk."""
    return checkpoint.resolve().parent == (Path(config.run.folder) / "checkpoints").resolve()


def checkpoint_to_resume(config: Config, damaged: Mapping[Path, str] | None = None) -> Path | None:
    """The checkpoint this start goes on from, or None for a new run. It may be damaged, but is none of ``damaged``,
    the checkpoints that are known to be and what is wrong with them.

    Raises:
        CheckpointError: the run's folder and ``checkpoint.resume`` do not go together, or all of a run's checkpoints
            are damaged.
    """
    run, resume = Path(config.run.folder), config.checkpoint.resume
    damaged = damaged or {}
    existing = [checkpoint for checkpoint in checkpoints_of(run) if checkpoint not in damaged]
    if resume == "never":
        if existing or (run / "metrics.jsonl").exists():
            raise CheckpointError(
                f"run.folder {run} holds a run already and checkpoint.resume is 'never': choose another run.name, "
                "or checkpoint.resume=auto to go on"
            )
        return None
    if resume == "auto":
        if damaged and not existing:
            raise CheckpointError(
                f"none of the checkpoints in {run} is good; the newest: {next(iter(damaged.values()))}. Restore one "
                "from a copy, or start anew with another run.name"
            )
        return existing[-1] if existing else None
    try:
        checkpoint = find_checkpoint(Path(resume))
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint.resume: {error}; or use auto or never") from error
    if checkpoint in damaged:
        raise CheckpointError(f"checkpoint.resume is damaged: {damaged[checkpoint]}; name another one")
    if not any((checkpoint / name).is_dir() for name in (OPTIMIZER, OLD_OPTIMIZER)):
        raise CheckpointError(
            f"checkpoint.resume is {checkpoint}, which holds a model without optimizer state ({OPTIMIZER}/): training "
            "cannot go on from it; name a checkpoint that a run has written"
        )
    if existing:
        newest = existing[-1]
        if incomplete_reason(newest) or read_state(newest).get("branched_from") == str(checkpoint.resolve()):
            return newest  # the same words, said again, go on with the branch
    newer = [p.name for p in existing if step_of(p) > step_of(checkpoint)]
    if newer:
        raise CheckpointError(
            f"checkpoint.resume is {checkpoint}, but run.folder {run} has gone on to {newer[-1]}: choose another "
            "run.name to branch off, or delete the newer checkpoints"
        )
    return checkpoint


def data_changes(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two identities of data, in words."""
    return [
        f"the data's {key} was {there.get(key)!r} there and is {here.get(key)!r} here: those are other sequences"
        for key in {**there, **here}
        if there.get(key) != here.get(key)
    ]


def topology_changes(content: dict[str, Any], config: Config, world_size: int) -> list[str]:
    """In what the state is spread and computed with in another way than it was, in words."""
    settings = {
        "ranks": ("world_size", world_size),
        "parallel.zero_stage": ("zero_stage", config.parallel.zero_stage),
        "train.precision": ("precision", config.train.precision),
    }
    return [
        f"{name} was {content[key]} there and is {here} here; the state is saved in float32, free of ranks and stages"
        for name, (key, here) in settings.items()
        if content[key] != here
    ]


def hyperparameter_changes(checkpoint: Path, config: Config) -> list[str]:
    """In what the updates from now on are made in another way than those before, in words."""
    return [
        f"{path} was {show(there)} there and is {show(here)} here"
        for path, there, here in differences(read_config(checkpoint), config)
        if path in _COURSE or path.partition(".")[0] in _COURSE
    ]


def check_compatible(
    checkpoint: Path,
    content: dict[str, Any],
    config: Config,
    identity: dict[str, Any],
    tokenizer: TokenizerInfo,
) -> TrainState:
    """The state to go on with. Its data may differ where ``checkpoint.allow_data_change`` is set, its tokenizer never.

    Raises:
        CheckpointError: model, batch or data differ, or the checkpoint is too old; every difference is named.
    """
    if (checkpoint / OLD_OPTIMIZER).is_dir():
        raise CheckpointError(
            f"{checkpoint} has its optimizer state in {OLD_OPTIMIZER}/, pickled by an earlier version of dcscale, and "
            "pickles are not loaded: go on with that version, or start a new run with another run.name. Its weights/ "
            "can be converted and evaluated as ever"
        )
    problems = [
        f"{path} is {show(there)} there and {show(here)} here: that is another model"
        for path, there, here in differences(read_config(checkpoint), config)
        if path.startswith("model.") and path not in MODEL_FIELDS_WITHOUT_WEIGHT
    ]
    there, here = content["global_batch_size"], config.train.global_batch_size
    if there != here:
        problems.append(f"train.global_batch_size is {there} there and {here} here: steps would have another meaning")
    state = TrainState.from_json(content)
    changes = data_changes(state.data_identity, identity)
    way_out = ""
    if changes and not config.checkpoint.allow_data_change:
        problems += changes
        way_out = ", or set checkpoint.allow_data_change=true to go on with other sequences"
    elif changes and content["tokenizer"]["fingerprint"] != tokenizer.fingerprint:
        problems.append("the data's tokenizer is another one: the same token would mean another text")
    if not _is_of_run(checkpoint, config):
        state.branched_from = str(checkpoint.resolve())
    if state.step > config.train.steps:
        problems.append(f"it is at step {state.step}, past train.steps {config.train.steps}")
    if problems:
        raise CheckpointError(
            f"{checkpoint} cannot be gone on from: " + "; ".join(problems) + ". Restore these settings, or start a new "
            f"run with another run.name{way_out}"
        )
    return state
