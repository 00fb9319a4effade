"""How the training state is spread over ranks: what DeepSpeed is told.

:mod:`dcscale.parallel.deepspeed_config` makes DeepSpeed's own config of it: ``zero_stage`` is ``stage`` there,
``bucket_size`` both ``reduce_bucket_size`` and ``allgather_bucket_size``, and the others have the names that
DeepSpeed gives them.
"""

from __future__ import annotations

from dataclasses import dataclass

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, choice, number


@dataclass
class ParallelConfig:
    """How the state is spread over ranks (DeepSpeed ZeRO)."""

    zero_stage: int = choice(0, 1, 2, 3, default=1)
    """ZeRO stage: 0 none, 1 optimizer states, 2 also gradients, 3 also parameters."""

    offload_optimizer: bool = False
    """Keep AdamW's moments and the float32 weights (12 bytes a parameter, over all ranks) in the host's memory, and
    update them there: saves the GPU's memory, costs time. Needs a ZeRO stage of 1 or more."""

    overlap_comm: bool = True
    """Overlap the reduction of gradients with the backward pass, where the accelerator can."""

    bucket_size: int = number(50_000_000, COUNT)
    """Elements reduced or gathered at once; bounds the communication buffers' memory (times bytes an element)."""

    param_persistence_threshold: int = number(100_000, NOT_NEGATIVE)
    """ZeRO-3 keeps parameters of fewer elements than this whole on every rank; gathering them would cost more."""

    timeout_minutes: float = number(30.0, POSITIVE)
    """A collective that waits longer fails, naming itself."""
