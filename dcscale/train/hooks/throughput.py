"""Speed, use of the hardware, and memory."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

import torch

from dcscale.train.hooks.base import Hook, Record

if TYPE_CHECKING:
    from dcscale.train.trainer import Trainer

PEAK_TFLOPS_BF16 = {
    "A100-SXM4-40GB": 312.0,
    "A100-SXM4-80GB": 312.0,
    "H100 80GB HBM3": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
}
"""Dense bf16 peak in TFLOP/s of one whole SXM device (NVIDIA's data sheets), by its name without "NVIDIA"."""


def peak_tflops(device: torch.device, precision: str, configured: float | None) -> float | None:
    """Peak of one device in TFLOP/s: as configured, or looked up for bf16 on a known GPU, else None."""
    if configured is not None or device.type != "cuda" or precision != "bf16":
        return configured
    # The whole name: PCIe and NVL boards and MIG slices have the chip's name in theirs, and a lower peak.
    return PEAK_TFLOPS_BF16.get(torch.cuda.get_device_name(device).removeprefix("NVIDIA "))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process in GiB: allocated tensors on a GPU, resident pages on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30  # Linux counts KiB


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
