"""What a feature of the training loop may do, and when."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcscale.observe.metrics import Record

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Hook:
    """A feature beside the loop. Every method runs on every rank, at the same point; all do nothing by default."""

    name: str = ""
    """Key of the hook's state in a checkpoint."""

    def after_step(self, trainer: Trainer) -> None:
        """After each optimizer step, and after its record was written if it had one."""

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        """Before a logged step's record is written: add to it."""

    def finish(self, trainer: Trainer, completed: bool) -> None:
        """After the last step of this start; ``completed`` tells the run's end from an early stop."""

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        """What the hook adds to ``summary.json``, as JSON values."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the hook needs to go on after a resume, as JSON values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""


def due(step: int, interval: int) -> bool:
    """Whether something done every ``interval`` steps (0: never) is done at ``step``."""
    return interval > 0 and step % interval == 0
