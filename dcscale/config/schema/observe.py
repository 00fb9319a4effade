"""Validation, samples and logging during training."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, number

MOST_PROFILED_STEPS = 10
"""Steps in one trace: more would show no more, and take memory and minutes to write."""


@dataclass
class ValidationConfig:
    """Loss and bits per byte on ``data.validation``."""

    interval: int = number(500, NOT_NEGATIVE)
    """Optimizer steps between validations; the last step is always validated. 0 turns validation off."""

    sequences: int = number(512, COUNT)
    """Number of held-out sequences used: always the same ones, evenly spaced over the shards; all if there are
    fewer."""


@dataclass
class SamplesConfig:
    """Text samples of the model during training, written to TensorBoard."""

    interval: int = number(0, NOT_NEGATIVE)
    """Optimizer steps between samples; also sampled at the end. 0 turns samples off."""

    prompts: list[str] = field(default_factory=lambda: ["def "])
    """Prompts that the model continues."""

    new_tokens: int = number(128, COUNT)
    """Tokens generated per prompt."""

    temperature: float = number(0.8, NOT_NEGATIVE)
    """Softmax temperature; 0 is greedy decoding."""

    top_p: float = number(0.95, Range(0, 1, open_low=True))
    """Nucleus sampling: sample among the most likely tokens whose probabilities add up to this value."""


@dataclass
class LogConfig:
    """What is logged, and how often."""

    interval: int = number(10, COUNT)
    """Optimizer steps between records in metrics.jsonl and TensorBoard. The loss is the mean over these steps'
    tokens."""

    compose_interval: int = number(100, NOT_NEGATIVE)
    """Optimizer steps between measurements of how much compose differs from the identity; also measured at the first
    and last step. Each measurement costs a forward pass of one sequence. 0 turns them off."""

    profile_steps: list[int] = number([], COUNT)
    """Optimizer steps of which rank 0 writes a profile into ``profiles/`` of the run folder, in ascending order, such
    as [100, 101, 102]; steps in a row, at most 10, are one trace. ``touch RUN/profile`` asks a running job for one."""

    peak_tflops: float | None = number(None, POSITIVE)
    """Peak dense TFLOP/s of one device in the run's precision, for MFU. null takes it from a table of known devices;
    no MFU is reported for a device that is not in it."""

    progress: bool = True
    """Show a progress bar on rank 0."""
