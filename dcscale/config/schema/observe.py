"""What a run measures, writes and shows while it trains."""

from __future__ import annotations

from dataclasses import dataclass, field

from dcscale.config.schema.limits import COUNT, NOT_NEGATIVE, POSITIVE, Range, number


@dataclass
class ValidationConfig:
    """Loss and bits per byte on ``data.validation``."""

    interval: int = number(500, NOT_NEGATIVE)
    """Steps between validations; one is also made at the end. 0 turns validation off."""

    sequences: int = number(512, COUNT)
    """Sequences of the held-out shards that are used: always the same, spread evenly; all where there are no more."""


@dataclass
class SamplesConfig:
    """Text that the model writes while it trains, into TensorBoard."""

    interval: int = number(0, NOT_NEGATIVE)
    """Steps between samples; one is also made at the end. 0 turns samples off."""

    prompts: list[str] = field(default_factory=lambda: ["def "])
    """Beginnings to be continued."""

    new_tokens: int = number(128, COUNT)
    """Tokens written for each prompt."""

    temperature: float = number(0.8, NOT_NEGATIVE)
    """Softmax temperature; 0 takes the most likely token."""

    top_p: float = number(0.95, Range(0, 1, open_low=True))
    """Sample among the most likely tokens that together have this probability."""


@dataclass
class LogConfig:
    """What is reported, and how often."""

    interval: int = number(10, COUNT)
    """Steps between lines of metrics.jsonl and points in TensorBoard. Losses are means over these steps' tokens."""

    compose_interval: int = number(100, NOT_NEGATIVE)
    """Steps between measurements of how far compose has moved from the identity, also made at the first step and the
    last; each costs one more forward of one sequence. 0 turns them off."""

    peak_tflops: float | None = number(None, POSITIVE)
    """Peak dense TFLOP/s of one device in the run's precision, for MFU;
    null looks the device up and gives no MFU where it is unknown."""

    progress: bool = True
    """Show a progress bar on rank 0."""
