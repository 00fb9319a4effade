"""What a run must remember beside weights and optimizer to go on as if it had never stopped."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from dcscale.checkpoint.layout import STATE_FORMAT
from dcscale.provenance import versions


@dataclass
class TrainState:
    """Counts up to and with the last finished optimizer step. All of it is in ``state.json`` of a checkpoint."""

    step: int = 0
    """Optimizer steps done."""

    tokens: int = 0
    """Tokens the model has read in training: sequences times their length, over all ranks."""

    sequences: int = 0
    """Sequences used in training, over all ranks: the number of the next one. With ``data_identity`` it is all that
    the data need to go on, on any number of ranks."""

    data_identity: dict[str, Any] = field(default_factory=dict)
    """What decides the data's content, order and cutting."""

    skipped: list[dict[str, Any]] = field(default_factory=list)
    """Training shards that were given up (``data.on_error=skip``), each a :class:`dcscale.data.SkippedShard`."""

    branched_from: str | None = None
    """The checkpoint that ``checkpoint.resume`` named when this run began, if it did."""

    initial_weights: str | None = None
    """The checkpoint or model folder that ``checkpoint.init_from`` named when this run began, if it did."""

    first_loss: float | None = None
    """Loss of step 1, nats a token."""

    last_loss: float | None = None
    """Loss of the last record, nats a token."""

    train_seconds: float = 0.0
    """Wall-clock seconds spent in optimizer steps, over all starts of the run."""

    pending: list[tuple[float, int]] = field(default_factory=list)
    """(loss sum in nats, targets) of the steps since the last logged one, so that a resumed run logs the same mean."""

    validation_loss: float | None = None
    """Of the model of this very step, nats a token; None if it was not validated."""

    hooks: dict[str, Any] = field(default_factory=dict)
    """State of the hooks, by their name."""

    def to_json(self, **extra: Any) -> dict[str, Any]:
        return {"format": STATE_FORMAT, **dataclasses.asdict(self), "versions": versions(), **extra}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainState:
        names = {f.name for f in dataclasses.fields(cls)}
        state = cls(**{key: value for key, value in content.items() if key in names})
        if "sequences" not in content:  # written before batches were counted by what they hold
            state.sequences = content["step"] * content["global_batch_size"]
        state.pending = [(float(loss), int(count)) for loss, count in state.pending]
        return state
