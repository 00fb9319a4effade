"""Settings of DeepSpeed: how the training state is partitioned over ranks.

:mod:`dcscale.parallel.deepspeed_config` generates DeepSpeed's own config from them: ``zero_stage`` is ``stage`` there,
``bucket_size`` is ``reduce_bucket_size``, ``allgather_bucket_size`` and ``stage3_prefetch_bucket_size``, and the other
names are the same as in DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, Range, choice, number

YEAR_OF_SECONDS, YEAR_OF_MINUTES = Range(0, 31_536_000, open_low=True), Range(0, 525_600, open_low=True)
"""Time limits: beyond some hundred years the timers of the operating system overflow."""


@dataclass
class ParallelConfig:
    """How the training state is partitioned over ranks (DeepSpeed ZeRO)."""

    zero_stage: int = choice(0, 1, 2, 3, default=1)
    """ZeRO stage, what is partitioned: 0 nothing, 1 optimizer states, 2 also gradients, 3 also parameters."""

    offload_optimizer: bool = False
    """Keep AdamW's moments and the float32 master weights (12 bytes per parameter, over all ranks) in host memory and
    update them on the CPU: saves GPU memory, costs time. Needs ZeRO stage 1 or higher."""

    overlap_comm: bool = True
    """Overlap the reduction of gradients with the backward pass, if the accelerator supports it."""

    bucket_size: int = number(50_000_000, COUNT)
    """Elements reduced or gathered in one collective. Times the bytes per element, it bounds a communication buffer."""

    param_persistence_threshold: int = number(100_000, NOT_NEGATIVE)
    """Only ZeRO-3: parameters with fewer elements than this are not partitioned, as gathering them would cost more."""

    start_timeout_minutes: float = number(10.0, YEAR_OF_MINUTES)
    """Minutes until all ranks must have arrived, and the longest that anything may take before the first step."""

    check_nodes: bool = True
    """Check all nodes before the model is built, for what would end the run later: limits of processes, shared memory,
    defects of GPUs, space for a checkpoint, a run folder that not all nodes share, a wrong all-reduce. What is found
    ends the start: code 76 if another start may be free of it, else 2. ``tools/doctor.py`` checks more."""

    hang_seconds: float | None = number(None, YEAR_OF_SECONDS)
    """Seconds that a step may take before the run is ended as hanging, with the stacks of all ranks, to be started
    again; null: ten times the median step, at least 30. A rank without a heartbeat counts as lost after 30 s, or after
    this if it is less."""

    pause_timeout_minutes: float = number(30.0, YEAR_OF_MINUTES)
    """The same for what is not a step, in minutes: waiting for data, validation, samples, waiting for a checkpoint."""
