"""Hooks: features that run next to the training loop, with their own state. :func:`build_hooks` lists all of them."""

from __future__ import annotations

from dcscale.config import Config
from dcscale.hardware import peak_tflops
from dcscale.models import count_flops
from dcscale.parallel import Environment
from dcscale.train.data import RunData
from dcscale.train.hooks.base import Hook
from dcscale.train.hooks.compose_distance import ComposeDistance
from dcscale.train.hooks.on_demand import OnDemand
from dcscale.train.hooks.progress import DataEpochs, SkippedData, SkippedUpdates, Throughput
from dcscale.train.hooks.samples import Samples
from dcscale.train.hooks.saving import Saving
from dcscale.train.hooks.stragglers import Stragglers
from dcscale.train.hooks.validation import Validation
from dcscale.train.state import TrainState

__all__ = ["Hook", "build_hooks"]


def build_hooks(config: Config, environment: Environment, data: RunData, state: TrainState) -> list[Hook]:
    """Builds the hooks that ``config`` enables, in calling order, with their state restored from ``state``."""
    hooks: list[Hook] = [
        # First, so that a trace ends before the other hooks do what belongs to no step.
        OnDemand(config.log.profile_steps),
        Throughput(
            count_flops(config.model, config.data.sequence_length).total,
            peak_tflops(environment.device, config.train.precision, config.log.peak_tflops),
        ),
        Stragglers(config.log.interval),
        DataEpochs(),
        SkippedData(),
        SkippedUpdates(),
    ]
    if data.validation is not None:
        hooks.append(Validation(data.validation, config.validation.interval, data.validation_bytes_per_target))
    if config.model.attention == "dcmha" and config.log.compose_interval > 0:
        hooks.append(ComposeDistance(config.log.compose_interval))
    if data.tokenizer is not None:
        hooks.append(Samples(config.samples, data.tokenizer, config.train.seed))
    # Last, so that a checkpoint contains what the other hooks did in its step.
    hooks.append(Saving(config.checkpoint.interval, config.checkpoint.on_error))
    for hook in hooks:
        if hook.name in state.hooks:
            hook.load_state_dict(state.hooks[hook.name])
    return hooks
