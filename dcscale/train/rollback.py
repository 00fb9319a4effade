"""Going back to the newest checkpoint after a spike, and past the data since (``train.on_spike=rollback``)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from dcscale.checkpoint import CheckpointError
from dcscale.parallel import RankError, broadcast_from_rank0
from dcscale.train.numerics import DivergedError
from dcscale.train.restore.rollbacks import Rollback, record_rollback, rollbacks_to
from dcscale.train.restore.start import Start, find_start

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


def roll_back(trainer: Trainer, text: str, reason: str) -> bool:
    """Makes the trainer what a start would be that resumes from its newest checkpoint and passes over the spike.

    All ranks call it together, after a step whose update was not made.

    Args:
        trainer: its state is that before the step; is not changed if the run cannot go back.
        text: which step is a spike and why, for messages.
        reason: why it is one.

    Returns:
        False if the run cannot go back, which is reported.

    Raises:
        DivergedError: the run has come back to this checkpoint too often.
        CheckpointError: a checkpoint that was being written failed, and ``checkpoint.on_error`` is ``fail``.
        LeaseLostError: another process has taken over the run folder.
    """
    for hook in trainer.hooks:  # saving waits for a checkpoint that is being written
        hook.before_rollback(trainer)
    try:
        start, times = _find(trainer)
        rollback = broadcast_from_rank0(lambda: _record(trainer, start, reason))
    except (CheckpointError, RankError) as error:
        trainer.warn(f"{text}. The run cannot go back, so the update is skipped: {error}")
        if trainer.environment.is_main:
            trainer.events.write("rollback_failure", step=trainer.state.step + 1, error=str(error))
        return False
    trainer.warn(
        f"{text}. The run goes back to {start.checkpoint} and passes over sequences {rollback.first:,} to "
        f"{rollback.end - 1:,} (train.on_spike=rollback), {times + 1} of at most "
        f"{trainer.config.train.max_skipped_updates} times to this checkpoint"
    )
    if trainer.environment.is_main:
        trainer.events.write(
            "rollback",
            step=rollback.step,
            reason=reason,
            checkpoint=str(start.checkpoint),
            sequences=[rollback.first, rollback.end],
        )
    rollback.apply(start.state)
    trainer.go_back_to(start)
    return True


def _find(trainer: Trainer) -> tuple[Start, int]:
    """What a resume from the newest checkpoint starts with, and how often the run has come back to it.

    Raises:
        CheckpointError: there is none, or it cannot be used.
    """
    latest, config = trainer.latest_checkpoint, trainer.config
    if latest is None:
        raise CheckpointError("there is no checkpoint yet")
    settings = replace(config.checkpoint, resume=str(latest), on_corrupt="fail")
    start = find_start(replace(config, checkpoint=settings), trainer.environment, trainer.loader.stream)
    times = broadcast_from_rank0(lambda: len(rollbacks_to(trainer.run, latest)))
    if times >= config.train.max_skipped_updates:
        raise DivergedError(
            f"step {trainer.state.step + 1} is a spike, and the run has gone back to {latest} {times} times, which is "
            "train.max_skipped_updates: lower optimizer.learning_rate, or inspect the data up to sequence "
            f"{trainer.state.sequences + config.train.global_batch_size - 1:,}"
        )
    return start, times


def _record(trainer: Trainer, start: Start, reason: str) -> Rollback:
    if trainer.lease is not None:
        trainer.lease.check()
    assert start.checkpoint is not None, "it resumes from one"
    batch = trainer.config.train.global_batch_size
    rollback = Rollback.of(start.checkpoint, start.state, trainer.state, batch, reason)
    record_rollback(trainer.run, rollback)
    return rollback
