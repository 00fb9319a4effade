"""The interface of hooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcscale.observe.metrics import Record

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Hook:
    """A feature of training. Every method is called on all ranks at the same point; by default it does nothing."""

    name: str = ""
    """Key of the hook's state in checkpoints."""

    def before_step(self, trainer: Trainer) -> None:
        """Called before the batches of each optimizer step are read, outside of what is timed as the step."""

    def after_step(self, trainer: Trainer) -> None:
        """Called after each optimizer step, and after its record if the step is logged."""

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        """Called before the record of a logged step is written; adds metrics to it."""

    def before_rollback(self, trainer: Trainer) -> None:
        """Called before the run goes back to its newest checkpoint; then comes :meth:`load_state_dict`."""

    def finish(self, trainer: Trainer, completed: bool) -> None:
        """Called after the last step of this start; ``completed``: the run is complete, not stopped early."""

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """Entries to add to ``summary.json``, as JSON values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """State to store in checkpoints, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""


def due(step: int, interval: int) -> bool:
    """Whether something that happens every ``interval`` steps (0: never) happens at ``step``."""
    return interval > 0 and step % interval == 0
