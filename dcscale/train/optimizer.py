"""AdamW with decay only where it belongs, and exceptions by parameter name."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import nn

from dcscale.config.schema import OptimizerConfig, OptimizerRule


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
