"""Judges each step before its update: loss or gradient not finite, or far above those of the steps before.

The values are the same on all ranks, and what they are compared with is part of every checkpoint. So all ranks decide
alike, and a resumed run decides as it would have without the stop.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any

from dcscale.config.schema import TrainConfig

WINDOW = 128
"""Steps that a step is compared with."""

FEWEST = 32
"""Steps that it takes before any is judged."""

KEPT_SKIPS = 100
"""Skipped updates whose step, reason and sequences are kept."""

_LEAST_DEVIATION = 1e-3
"""Of logarithms, so 0.1 %: where losses hardly vary, a small rise is no spike."""

_TINY = 1e-30
"""Takes the place of 0, which has no logarithm."""


class DivergedError(FloatingPointError):
    """Loss or gradient are not finite or spike, and the config says to stop. The state before was saved.

    Args:
        message: the message.
        rank: the only rank whose loss is not finite; -1: it is not one rank alone.
    """

    def __init__(self, message: str, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class Action(Enum):
    """What becomes of a step."""

    UPDATE = "its update is made"
    SKIP = "its update is skipped"
    ROLL_BACK = "the run goes back to its newest checkpoint"
    STOP = "the run stops"


@dataclass(frozen=True)
class Judgement:
    """What was found about the loss and gradient of a step, and what follows."""

    action: Action
    loss_sum: float
    """Of all ranks, nats."""
    targets: int
    grad_norm: float
    reason: str | None = None
    """What is wrong with the step; None: nothing."""
    score: float | None = None
    """The larger :func:`robust_score` of loss and norm; None before there are enough steps to compare with."""
    rank: int = -1
    """The only rank whose loss is not finite; -1: it is not one rank alone."""

    @property
    def loss(self) -> float:
        """Mean over the targets, nats/token."""
        return self.loss_sum / self.targets

    @property
    def finite(self) -> bool:
        """Whether loss and gradient norm are finite."""
        return math.isfinite(self.loss_sum) and is_norm(self.grad_norm)

    @property
    def spike(self) -> bool:
        """Whether loss or norm are finite, but far above those of the steps before."""
        return self.finite and self.reason is not None


@dataclass
class Numerics:
    """What a run remembers to judge its steps, and of the steps that were not as they should be."""

    recent: list[tuple[float, float]] = field(default_factory=list)
    """Loss (nats/token) and gradient norm of the last ``WINDOW`` steps that had an update and were no spikes."""

    spikes: int = 0
    """Steps so far that were spikes, without those that the run went back from."""

    spikes_in_a_row: int = 0
    """Spikes up to now since the last step that was none."""

    skipped_updates: int = 0
    """Updates skipped so far, because loss or gradient was not finite or a spike."""

    skipped_in_a_row: int = 0
    """Updates skipped up to now since the last update."""

    skips: list[dict[str, Any]] = field(default_factory=list)
    """``step``, ``reason`` and ``sequences`` (numbers from, up to) of the last skipped updates."""

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Numerics:
        """Restores what ``dataclasses.asdict`` has written; other keys are ignored."""
        names = {f.name for f in fields(cls)}
        numerics = cls(**{key: value for key, value in content.items() if key in names})
        numerics.recent = [(float(loss), float(norm)) for loss, norm in numerics.recent]
        return numerics

    def count(self, judgement: Judgement, restart_after: int) -> bool:
        """Counts a step that the run does not go back from.

        A spike is not compared with later. So if ``restart_after`` steps in a row are spikes but have their update,
        they are the new level, and the comparison begins again.

        Returns:
            Whether the comparison begins again.
        """
        updated = judgement.action is Action.UPDATE
        self.skipped_updates += not updated
        self.skipped_in_a_row = 0 if updated else self.skipped_in_a_row + 1
        self.spikes += judgement.spike
        self.spikes_in_a_row = self.spikes_in_a_row + 1 if judgement.spike else 0
        if updated and not judgement.spike:
            self.recent = [*self.recent[1 - WINDOW :], (judgement.loss, judgement.grad_norm)]
        restart = updated and self.spikes_in_a_row >= restart_after
        if restart:
            self.recent, self.spikes_in_a_row = [], 0
        return restart


def list_some(items: Sequence[object], separator: str = ", ", most: int = 8) -> str:
    """The first items as text, and how many more there are."""
    more = [f"{len(items) - most} more"] if len(items) > most else []
    return separator.join([*map(str, items[:most]), *more])


def is_norm(value: float) -> bool:
    """Whether a value is a finite norm. DeepSpeed has used -1 for norms that are not."""
    return 0 <= value < math.inf


def robust_score(value: float, earlier: Sequence[float]) -> float:
    """How far a value is above the median of earlier ones, in robust standard deviations of their logarithms.

    The median absolute deviation, times 1.4826, is the standard deviation of normally distributed values, and a few
    outliers do not change it. Gradient norms of batches have a long upper tail; their logarithms have not.
    """
    logs = [math.log(max(x, _TINY)) for x in earlier]
    median = statistics.median(logs)
    deviation = 1.4826 * statistics.median(abs(x - median) for x in logs)
    return (math.log(max(value, _TINY)) - median) / max(deviation, _LEAST_DEVIATION)


def judge(
    config: TrainConfig, recent: Sequence[tuple[float, float]], loss_sum: float, targets: int, grad_norm: float
) -> Judgement:
    """Judges a step.

    Args:
        config: the policies.
        recent: what to compare with, :attr:`Numerics.recent`.
        loss_sum: of all ranks, nats.
        targets: of all ranks, at least 1.
        grad_norm: global L2 norm of the gradient before clipping.
    """
    loss = loss_sum / targets
    if not (math.isfinite(loss) and is_norm(grad_norm)):
        action = {"stop": Action.STOP, "skip": Action.SKIP}[config.on_nonfinite]
        return Judgement(action, loss_sum, targets, grad_norm, f"loss {loss:g}, gradient norm {grad_norm:g}")
    if len(recent) < FEWEST:
        return Judgement(Action.UPDATE, loss_sum, targets, grad_norm)
    losses, norms = zip(*recent, strict=True)
    values = {"loss": (loss, losses), "gradient norm": (grad_norm, norms)}
    scores = {name: robust_score(value, earlier) for name, (value, earlier) in values.items()}
    reasons = [
        f"{name} {values[name][0]:.4g}, {score:.1f} robust standard deviations above the median of "
        f"{statistics.median(values[name][1]):.4g}"
        for name, score in scores.items()
        if score > config.spike_score
    ]
    action = {"skip": Action.SKIP, "rollback": Action.ROLL_BACK}.get(config.on_spike, Action.UPDATE)
    return Judgement(
        action if reasons else Action.UPDATE,
        loss_sum,
        targets,
        grad_norm,
        " and ".join(reasons) or None,
        max(scores.values()),
    )
