"""The learning rate as a function of the step alone: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from dcscale.config.schema import ScheduleConfig


def learning_rate(config: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, in a run of ``steps``.

    Warm-up is linear and reaches the peak at step ``warmup_steps - 1``.
    ``cosine`` then falls along half a cosine and ``wsd`` (warm-up, stable, decay: Hu et al., MiniCPM,
    arXiv 2404.06395) along a straight line over its last ``decay_steps``; both reach
    ``final_ratio * peak`` at the last step.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return peak
    if config.kind == "wsd":
        length = decay_steps(config, steps)
        first = steps - length
        progress = max(0.0, (step - first + 1) / length) if length else 0.0
        factor = 1.0 - min(progress, 1.0)
    else:
        span = max(1, steps - config.warmup_steps)
        progress = min(1.0, (step - config.warmup_steps + 1) / span)
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return peak * (config.final_ratio + (1.0 - config.final_ratio) * factor)


def decay_steps(config: ScheduleConfig, steps: int) -> int:
    """Length of the decay of ``wsd``."""
    return steps // 5 if config.decay_steps is None else config.decay_steps
