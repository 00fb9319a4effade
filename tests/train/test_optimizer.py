"""Weight decay by default, and rules by parameter name."""

import pytest
import torch
from torch import nn

from dcscale.config.schema import OptimizerConfig, OptimizerRule
from dcscale.train.optimizer import RuleError, build_optimizer, parameter_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.q = nn.Linear(4, 4)
        self.dw1 = nn.Parameter(torch.zeros(4, 4, 8))


def settings(*rules):
    groups = parameter_groups(Model(), OptimizerConfig(weight_decay=0.1, rules=list(rules)))
    return {name: (g["lr_scale"], g["weight_decay"]) for g in groups for name in g["names"]}


def test_only_matrices_decay_and_not_the_embedding():
    assert settings() == {
        "embedding.weight": (1.0, 0.0),
        "norm.weight": (1.0, 0.0),
        "norm.bias": (1.0, 0.0),
        "q.weight": (1.0, 0.1),
        "q.bias": (1.0, 0.0),
        "dw1": (1.0, 0.1),
    }


def test_the_first_matching_rule_applies():
    found = settings(
        OptimizerRule("dw1", lr_scale=0.5),
        OptimizerRule("*.weight", weight_decay=0.3),
        OptimizerRule("q.*", lr_scale=2.0),
    )
    assert found["dw1"] == (0.5, 0.1)
    assert found["q.weight"] == (1.0, 0.3)
    assert found["q.bias"] == (2.0, 0.0)
    assert found["embedding.weight"] == (1.0, 0.3)


def test_a_rule_that_applies_to_no_parameter_is_rejected():
    with pytest.raises(RuleError, match=r"'blocks\.\*' applies to no parameter. Names look like 'dw1'|'embedding"):
        settings(OptimizerRule("blocks.*", lr_scale=0.5))
    with pytest.raises(RuleError, match="'q.weight'"):
        settings(OptimizerRule("q.*"), OptimizerRule("q.weight", lr_scale=0.5))


def test_optimizer_settings():
    optimizer = build_optimizer(Model(), OptimizerConfig(betas=[0.8, 0.9], eps=1e-7), fused=False)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (0.0, (0.8, 0.9), 1e-7)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
