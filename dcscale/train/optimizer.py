"""AdamW with per-parameter rules, and the learning rate schedule."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch
from torch import nn

from dcscale.config.schema import OptimizerConfig, OptimizerRule, ScheduleConfig


class RuleError(ValueError):
    """A rule of ``optimizer.rules`` matches nothing."""


def has_weight_decay(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies by default: to matrices and compose tensors, not to vectors and the embedding."""
    # ZeRO-3 leaves an empty tensor in place of a partitioned parameter and keeps its full shape in ds_shape.
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and not name.startswith("embedding.")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """Groups the parameters by their settings, as param groups of a torch optimizer.

    Each group has the keys ``params``, ``names``, ``lr_scale`` and ``weight_decay``. The first rule whose pattern
    matches a parameter's name applies.

    Raises:
        RuleError: a rule matches no parameter.
    """
    groups: dict[tuple[float, float], dict] = {}
    unused = {id(rule): rule for rule in config.rules}
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in config.rules if fnmatchcase(name, rule.match)), OptimizerRule())
        unused.pop(id(rule), None)
        decay = config.weight_decay if has_weight_decay(name, parameter) else 0.0
        if rule.weight_decay is not None:
            decay = rule.weight_decay
        group = groups.setdefault(
            (rule.lr_scale, decay), {"params": [], "names": [], "lr_scale": rule.lr_scale, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    if unused:
        patterns = ", ".join(repr(rule.match) for rule in unused.values())
        example = next(name for name, _ in model.named_parameters())
        raise RuleError(
            f"optimizer.rules: {patterns} applies to no parameter. Names look like {example!r}; of several rules that "
            "match a name the first one applies. Correct the pattern, change the order, or remove the rule"
        )
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`. The learning rate is 0 until the engine sets it, before each step.

    Args:
        model: the model, partitioned by ZeRO or not.
        config: betas, epsilon, weight decay and rules.
        fused: update all parameters of a group in one kernel.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=fused,
    )


def learning_rate(config: ScheduleConfig, peak: float, steps: int, step: int) -> float:
    """The learning rate of optimizer step ``step``, counted from 0, in a run of ``steps`` steps.

    Linear warm-up reaches the peak at step ``warmup_steps - 1``. Then ``cosine`` decays along half a cosine; ``wsd``
    (warm-up, stable, decay: Hu et al., MiniCPM, arXiv 2404.06395) stays at the peak and decays linearly over the last
    ``decay_steps``. Both reach ``final_ratio * peak`` at the last step.
    """
    if step < config.warmup_steps:
        # step + 1: the first step already has a learning rate above 0.
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
    """Number of steps over which ``wsd`` decays: by default the last fifth of the run."""
    return steps // 5 if config.decay_steps is None else config.decay_steps
