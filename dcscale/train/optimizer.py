"""AdamW with rules by parameter name, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import torch
from torch import nn

from dcscale.config.schema import OptimizerConfig, OptimizerRule, ScheduleConfig


class RuleError(ValueError):
    """A rule of ``optimizer.rules`` matches nothing."""


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter decays by default: matrices and the compose tensors do, vectors and the embedding do not.

    ``ds_shape`` is the whole shape of a parameter that ZeRO-3 has partitioned.
    """
    return len(getattr(parameter, "ds_shape", parameter.shape)) >= 2 and not name.startswith("embedding.")


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict]:
    """The model's parameters as torch optimizer groups of equal settings.

    Each group has ``params``, ``lr_scale``, ``weight_decay`` and ``names``. The first rule whose
    pattern matches a name counts.

    Raises:
        RuleError: a rule matches no parameter.
    """
    groups: dict[tuple[float, float], dict] = {}
    unused = {id(rule): rule for rule in config.rules}
    for name, parameter in model.named_parameters():
        rule = next((rule for rule in config.rules if fnmatchcase(name, rule.match)), OptimizerRule())
        unused.pop(id(rule), None)
        decay = config.weight_decay if decays(name, parameter) else 0.0
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
            f"optimizer.rules: {patterns} decides for no parameter; names look like {example!r}, and an earlier rule "
            "that matches the same names wins. Correct the pattern, its place, or remove the rule"
        )
    return list(groups.values())


def build_optimizer(model: nn.Module, config: OptimizerConfig, fused: bool) -> torch.optim.AdamW:
    """AdamW over :func:`parameter_groups`, with learning rate 0 until the engine sets it, at each step.

    ``fused`` runs one kernel for all parameters of a group.
    """
    return torch.optim.AdamW(
        parameter_groups(model, config),
        lr=0.0,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        fused=fused,
    )


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
