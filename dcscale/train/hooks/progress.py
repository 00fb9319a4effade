"""Metrics in every record besides the loss: throughput, utilization, memory, data epochs, skipped data, spikes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dcscale.hardware import peak_memory_gib
from dcscale.observe.metrics import DATA_EPOCH, Record
from dcscale.train.hooks.base import Hook

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer


class Throughput(Hook):
    """Adds tokens/s, TFLOP/s, MFU, step time, data wait and memory to each record.

    Only training steps are timed: not validation, samples and checkpoints. Only tokens that are not padding count, so
    MFU is the work on text: rows that are half padding halve it.

    Args:
        flops_per_token: FLOPs of forward and backward per token of a full sequence, compose terms included
            (:func:`dcscale.models.count_flops`); recomputation by activation checkpointing is not counted.
        peak: peak TFLOP/s of a device; None: unknown, so MFU is not computed.
    """

    name = "throughput"

    def __init__(self, flops_per_token: float, peak: float | None):
        self._flops_per_token = flops_per_token
        self._peak = peak

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        timings = trainer.pop_timings()
        tokens_per_second = timings.tokens / timings.seconds
        # MFU = tokens/s * FLOPs per token / (devices * peak FLOP/s)
        tflops = tokens_per_second * self._flops_per_token / trainer.environment.world_size / 1e12
        record["tokens_per_second"] = tokens_per_second
        record["tflops_per_device"] = tflops
        record["mfu"] = None if self._peak is None else tflops / self._peak
        record["step_seconds"] = timings.seconds / timings.steps
        record["data_wait"] = timings.wait_seconds / timings.seconds
        record["memory_gib"] = peak_memory_gib(trainer.environment.device)


class DataEpochs(Hook):
    """Adds the epochs trained on so far to each record; for a mixture those of each source, by its name."""

    name = "data_epochs"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        for source, epochs in trainer.loader.epochs(trainer.state.sequences).items():
            record[f"{DATA_EPOCH}/{source}" if source else DATA_EPOCH] = epochs


class SkippedData(Hook):
    """Adds the number of skipped shards and their tokens to each record, if shards may be or have been skipped."""

    name = "skipped_data"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        if trainer.state.skipped or trainer.config.data.on_error == "skip":
            record.update(self.summary(trainer))

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        skipped = trainer.state.skipped
        return {"skipped_shards": len(skipped), "skipped_tokens": sum(shard["tokens"] for shard in skipped)}


class SkippedUpdates(Hook):
    """Adds the numbers of spikes, skipped updates, rollbacks and sequences passed over to each record, if not 0."""

    name = "skipped_updates"

    def add_to_record(self, trainer: Trainer, record: Record) -> None:
        record.update({key: value for key, value in self.summary(trainer).items() if value})

    def summary(self, trainer: Trainer) -> dict[str, Any]:
        state = trainer.state
        return {
            "spikes": state.numerics.spikes,
            "skipped_updates": state.numerics.skipped_updates,
            "rollbacks": len(state.passed_over),
            "passed_over_sequences": state.passed_over_sequences,
        }
