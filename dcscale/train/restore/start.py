"""How a run starts: fresh, with the weights of another model, or from one of its checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from dcscale.checkpoint.layout import OPTIMIZER, read_state
from dcscale.checkpoint.training_state import Fragments
from dcscale.config import Config
from dcscale.data import Stream
from dcscale.parallel import Environment, broadcast_from_rank0, run_on_all_ranks
from dcscale.parallel.zero_state import SavedState
from dcscale.train.restore.init_from import init_from_changes, initial_weights
from dcscale.train.restore.resume import (
    check_compatible,
    data_changes,
    find_resumable_checkpoint,
    hyperparameter_changes,
    topology_changes,
)
from dcscale.train.state import TrainState


class StartKind(Enum):
    FRESH = "random weights"
    INIT_FROM = "the weights of another model"
    RESUME = "a checkpoint of this run, or of the one it branches off from"


@dataclass(frozen=True)
class Start:
    """Where this start of the run begins. The same on all ranks."""

    kind: StartKind
    state: TrainState
    """Counts of what was done before; restored from the checkpoint when resuming."""

    checkpoint: Path | None = None
    """The checkpoint that is resumed from."""

    saved: SavedState | None = None
    """Weights and optimizer state for :meth:`dcscale.parallel.Engine.load`; None: random weights."""

    messages: tuple[str, ...] = ()
    """What a person should know, a console line each."""

    corrupt: Mapping[Path, str] = field(default_factory=dict)
    """Newer checkpoints that cannot be used, and what is wrong with each."""


def find_start(config: Config, environment: Environment, stream: Stream) -> Start:
    """Decides where to start and checks that it fits config and data. All ranks call it together; no file is changed.

    Raises:
        CheckpointError: the checkpoint or the weights cannot be used for this run.
    """
    rank, ranks = environment.rank, environment.world_size
    checkpoint, corrupt = find_resumable_checkpoint(config, rank, ranks)
    if checkpoint is not None:
        return _resume(config, ranks, stream, checkpoint, corrupt)
    state = TrainState(data_identity=stream.identity)
    if config.checkpoint.init_from is None:
        return Start(StartKind.FRESH, state)
    saved = run_on_all_ranks(lambda: initial_weights(config, stream.tokenizer, rank, ranks))
    state.initial_weights = str(saved.source.resolve())
    messages = [f"beginning  with the weights of {saved.source}", *(f"warning    {text}" for text in saved.warnings)]
    return Start(StartKind.INIT_FROM, state, saved=saved, messages=tuple(messages))


def _resume(config: Config, ranks: int, stream: Stream, checkpoint: Path, corrupt: Mapping[Path, str]) -> Start:
    content = broadcast_from_rank0(lambda: read_state(checkpoint))
    state = broadcast_from_rank0(
        lambda: check_compatible(checkpoint, content, config, stream.identity, stream.tokenizer)
    )
    saved = run_on_all_ranks(lambda: Fragments(checkpoint / OPTIMIZER))
    changed = [
        *topology_changes(content, config, ranks),
        *broadcast_from_rank0(lambda: hyperparameter_changes(checkpoint, config)),
    ]
    messages = [f"resuming   {change}" for change in changed]
    for change in data_changes(state.data_identity, stream.identity):
        messages.append(f"warning    {change}, as checkpoint.allow_data_change lets them be")
    for warning in init_from_changes(state.initial_weights, config.checkpoint.init_from):
        messages.append(f"warning    {warning}")
    state.data_identity = stream.identity
    return Start(StartKind.RESUME, state, checkpoint, saved, tuple(messages), corrupt)
