"""Training progress that a checkpoint stores besides weights and optimizer state, for an exact resume."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dcscale.checkpoint.layout import STATE_FORMAT
from dcscale.provenance import versions
from dcscale.train.numerics import Numerics


@dataclass
class TrainState:
    """Progress up to and including the last finished optimizer step. All fields are stored in ``state.json``."""

    step: int = 0
    """Optimizer steps done."""

    tokens: int = 0
    """Tokens trained on so far, over all ranks: the inputs of all steps that made an update, without padding. Up to a
    checkpoint from before padding was counted apart, its padding is included."""

    padding_tokens: int = 0
    """Inputs that were padding so far, over all ranks."""

    steps_without_targets: int = 0
    """Steps so far whose global batch had no target, and which therefore changed no weight."""

    sequences: int = 0
    """Number of the next sequence: those of all steps so far, over all ranks, and those passed over. Together with
    ``data_identity`` it determines all further batches, on any number of ranks."""

    passed_over: list[dict[str, Any]] = field(default_factory=list)
    """Ranges of sequences that were passed over after going back to a checkpoint (``train.on_spike=rollback``): from
    ``first`` up to ``end``, because of ``step`` and its ``reason``."""

    numerics: Numerics = field(default_factory=Numerics)
    """What the next step is compared with, and counts of spikes and skipped updates."""

    data_identity: dict[str, Any] = field(default_factory=dict)
    """Everything that determines the sequences: content of the shards, order, and sequence length."""

    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Training shards that were skipped (``data.on_error=skip``), each a :class:`dcscale.data.SkippedShard`."""

    branched_from: str | None = None
    """The checkpoint of another run that this run was started from with ``checkpoint.resume``, if any."""

    initial_weights: str | None = None
    """The checkpoint or model folder that this run was started from with ``checkpoint.init_from``, if any."""

    scratch_mib: int | None = None
    """Scratch memory of an attention call in MiB. Stored because it decides the chunks, and with them the bits of the
    results; ``model.scratch_mib`` may be null, and a resume may get other devices."""

    first_loss: float | None = None
    """Loss of the first step that had targets, nats/token."""

    last_loss: float | None = None
    """Loss of the last record with one, nats/token."""

    train_seconds: float = 0.0
    """Wall-clock seconds spent in optimizer steps, over all starts of the run."""

    pending: list[tuple[float, int]] = field(default_factory=list)
    """(loss sum in nats, targets) of the steps with targets since the last logged one, so that a resumed run logs the
    same mean."""

    validation_loss: float | None = None
    """Validation loss of the model after exactly this step, nats/token; None if it was not validated."""

    hooks: dict[str, Any] = field(default_factory=dict)
    """State of the hooks, by hook name."""

    @property
    def passed_over_sequences(self) -> int:
        """How far ``sequences`` is ahead of those of the steps."""
        return sum(part["end"] - part["first"] for part in self.passed_over)

    def to_json(self, **extra: Any) -> dict[str, Any]:
        """The content of ``state.json``, with ``extra`` keys added."""
        return {"format": STATE_FORMAT, **dataclasses.asdict(self), "versions": versions(), **extra}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainState:
        """Restores a state from the content of ``state.json``; other keys are ignored."""
        names = {f.name for f in dataclasses.fields(cls)}
        state = cls(**{key: value for key, value in content.items() if key in names})
        state.numerics = Numerics.from_json(content.get("numerics", {}))
        # Older checkpoints also have the steps without targets.
        state.pending = [(float(loss), int(count)) for loss, count in state.pending if count]
        return state
