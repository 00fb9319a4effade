"""What every record has besides the loss: speed, use of the hardware, memory, and what was used of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcscale.hardware import peak_memory_gib
from dcscale.observe.metrics import DATA_EPOCH, Record
from dcscale.train.hooks.base import Hook

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Throughput(Hook):
    """Adds tokens/s, TFLOP/s, MFU, step time, data wait and memory to each record.

    MFU = tokens/s * FLOPs a token / (devices * peak FLOP/s). FLOPs a token are those of forward and
    backward of the model, compose terms included (:func:`dcscale.models.count_flops`); what activation
    checkpointing computes again is not counted. Validation, samples and checkpoints are not timed.
    """

    name = "throughput"

    def __init__(self, flops_per_token: float, peak: float | None):
        self._flops_per_token = flops_per_token
        self._peak = peak

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        seconds, waited, steps = trainer.take_times()
        rate = steps * trainer.tokens_per_step / seconds
        tflops = rate * self._flops_per_token / trainer.environment.world_size / 1e12
        record["tokens_per_second"] = rate
        record["tflops_per_device"] = tflops
        record["mfu"] = None if self._peak is None else tflops / self._peak
        record["step_seconds"] = seconds / steps
        record["data_wait"] = waited / seconds
        record["memory_gib"] = peak_memory_gib(trainer.environment.device)


class DataEpochs(Hook):
    """Adds the epochs used so far to each record, of each source by its name where several are mixed."""

    name = "data_epochs"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        for source, epochs in trainer.loader.epochs(trainer.state.sequences).items():
            record[f"{DATA_EPOCH}/{source}" if source else DATA_EPOCH] = epochs


class SkippedData(Hook):
    """Adds the shards given up so far and their tokens to each record, where shards may be given up or were."""

    name = "skipped_data"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        skipped = trainer.state.skipped
        if skipped or trainer.config.data.on_error == "skip":
            record["skipped_shards"] = len(skipped)
            record["skipped_tokens"] = sum(shard["tokens"] for shard in skipped)

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        skipped = trainer.state.skipped
        return {"skipped_shards": len(skipped), "skipped_tokens": sum(shard["tokens"] for shard in skipped)}
