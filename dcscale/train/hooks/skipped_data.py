"""How much of the training data is lost with shards that were given up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dcscale.train.hooks.base import Hook, Record

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class SkippedData(Hook):
    """Adds the shards given up so far and their tokens to each record, where shards may be given up or were."""

    name = "skipped_data"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        skipped = trainer.state.skipped
        if skipped or trainer.config.data.on_error == "skip":
            record["skipped_shards"] = len(skipped)
            record["skipped_tokens"] = sum(shard["tokens"] for shard in skipped)
