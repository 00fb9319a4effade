"""How often the training data have been used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcscale.train.hooks.base import Hook, Record
from dcscale.train.metrics import DATA_EPOCH

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class DataEpochs(Hook):
    """Adds the epochs used so far to each record, of each source by its name where several are mixed."""

    name = "data_epochs"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        for source, epochs in trainer.loader.epochs(trainer.state.sequences).items():
            record[f"{DATA_EPOCH}/{source}" if source else DATA_EPOCH] = epochs
