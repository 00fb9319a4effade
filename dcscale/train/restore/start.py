"""How a run starts: from random weights, from the weights of another model, or from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from dcscale.checkpoint.layout import OPTIMIZER, read_config, read_state
from dcscale.checkpoint.training_state import TrainingStateReader
from dcscale.config import Config
from dcscale.data import Stream
from dcscale.parallel import Environment, broadcast_from_rank0, run_on_all_ranks
from dcscale.parallel.zero_state import SavedState
from dcscale.train.restore.init_from import initial_weights
from dcscale.train.restore.resume import find_resumable_checkpoint, restore_state
from dcscale.train.restore.rollbacks import rollbacks_to
from dcscale.train.state import TrainState


class StartKind(Enum):
    FRESH = "random weights"
    INIT_FROM = "the weights of another model"
    RESUME = "a checkpoint of this run, or of the run that it branches from"


@dataclass(frozen=True)
class Start:
    """What this start of the run begins with. The same on all ranks."""

    kind: StartKind
    state: TrainState
    """Progress of the run; restored from the checkpoint when resuming."""

    checkpoint: Path | None = None
    """The checkpoint to resume from; None unless resuming."""

    saved: SavedState | None = None
    """Weights and optimizer state for :meth:`dcscale.parallel.Engine.load`; None: keep the random weights."""

    messages: tuple[str, ...] = ()
    """Console lines for the user."""

    corrupt: Mapping[Path, str] = field(default_factory=dict)
    """Newer checkpoints that are corrupt, with the problem of each."""


def find_start(config: Config, environment: Environment, stream: Stream | None, verify: bool = True) -> Start:
    """Finds what to start from and checks that it fits config and data. All ranks call it together; changes no files.

    Args:
        config: the settings of the run.
        environment: this process.
        stream: the training data; None, if it cannot be opened, checks the rest.
        verify: compare the checksums of a checkpoint, and not only the sizes of its files.

    Raises:
        CheckpointError: the checkpoint or the weights cannot be used for this run.
    """
    rank, ranks = environment.rank, environment.world_size
    checkpoint, corrupt = find_resumable_checkpoint(config, rank, ranks, verify)
    if checkpoint is not None:
        return _resume(config, ranks, stream, checkpoint, corrupt)
    state = TrainState(data_identity={} if stream is None else stream.identity)
    if config.checkpoint.init_from is None:
        return Start(StartKind.FRESH, state)
    tokenizer = None if stream is None else stream.tokenizer
    saved = run_on_all_ranks(lambda: initial_weights(config, tokenizer, rank, ranks, verify))
    state.initial_weights = str(saved.source.resolve())
    messages = [f"starting   from the weights of {saved.source}", *(f"warning    {text}" for text in saved.warnings)]
    return Start(StartKind.INIT_FROM, state, saved=saved, messages=tuple(messages))


def _resume(config: Config, ranks: int, stream: Stream | None, checkpoint: Path, corrupt: Mapping[Path, str]) -> Start:
    content, saved_config = broadcast_from_rank0(lambda: (read_state(checkpoint), read_config(checkpoint)))
    state, messages = broadcast_from_rank0(
        lambda: restore_state(checkpoint, content, saved_config, config, ranks, stream)
    )
    for rollback in broadcast_from_rank0(lambda: rollbacks_to(Path(config.run.folder), checkpoint)):
        rollback.apply(state)
        messages.append(
            f"resuming   after a rollback to {checkpoint.name} from a spike in step {rollback.step}: passes over "
            f"sequences {rollback.first:,} to {rollback.end - 1:,}"
        )
    saved = run_on_all_ranks(lambda: TrainingStateReader(checkpoint / OPTIMIZER))
    return Start(StartKind.RESUME, state, checkpoint, saved, tuple(messages), corrupt)
