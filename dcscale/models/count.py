"""Parameters and floating-point operations of a model, compose included, without building it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from dcscale.config.schema import ModelConfig
from dcscale.models.dcformer import DCFormer
from dcscale.models.dcmha import ComposeProjection
from dcscale.ops.masks import visible_pairs


class _Breakdown:
    @property
    def total(self):
        """Sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class ParameterCount(_Breakdown):
    """Number of parameters by part; a tied output matrix counts once, as embedding."""

    embedding: int = 0
    attention: int = 0
    """Matrices and biases of q, k, v and out."""
    compose: int = 0
    """dw1, qkw and dd: 20*E*H + 64*H^2 a layer at rank 2 with everything switched on."""
    ffn: int = 0
    norm: int = 0
    """Norms of blocks, q, k and output."""
    output: int = 0


@dataclass(frozen=True)
class FlopCount(_Breakdown):
    """Floating-point operations for one token of a training step: forward and backward, 3 x forward.

    A multiply-add counts as two. Counted are matrix products, scores and compose; not norms, activations,
    softmax, the embedding's look-up, and never recomputation, so that utilisation compares across settings.
    """

    attention_projections: float = 0.0
    scores: float = 0.0
    """q k^T and P v over the visible keys: 4*H*D a pair forward."""
    compose_projection: float = 0.0
    """From the layer's input to the compose weights."""
    compose_mixing: float = 0.0
    """Applying them: a visible pair and active branch 4*R*H for the low-rank part and 2*H for the gate, forward;
    40*H a pair at rank 2 with everything switched on."""
    ffn: float = 0.0
    output: float = 0.0


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model that ``config`` describes. Raises ValueError where the model itself would."""
    counts = dict.fromkeys((part.name for part in fields(ParameterCount)), 0)
    for name, parameter in _meta_model(config).named_parameters():
        counts[_part(name)] += parameter.numel()
    return ParameterCount(**counts)


def count_flops(config: ModelConfig, sequence_length: int) -> FlopCount:
    """FLOPs a token in sequences of ``sequence_length`` tokens, each of one document.

    Causality and windows are respected: the query at position t (from 0) sees min(t + 1, window) keys.
    Raises ValueError where the model itself would, and for a length below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}, but must be 1 or more")
    model = _meta_model(config)
    matrices = dict.fromkeys((part.name for part in fields(ParameterCount)), 0)
    for name, parameter in model.named_parameters():
        matrices[_part(name)] += parameter.numel() if parameter.dim() > 1 else 0
    scores = mixing = 0.0
    for block in model.blocks:
        keys = visible_pairs(sequence_length, block.attention.window) / sequence_length
        scores += keys * 4 * config.heads * block.attention.head_dim
        if block.attention.compose is not None:
            mixing += keys * _mixing_flops_per_pair(block.attention.compose)
    forward = {
        "attention_projections": 2 * matrices["attention"],
        "scores": scores,
        "compose_projection": 2 * matrices["compose"],
        "compose_mixing": mixing,
        "ffn": 2 * matrices["ffn"],
        "output": 2 * model.output.weight.numel(),
    }
    return FlopCount(**{part: 3.0 * flops for part, flops in forward.items()})


def _meta_model(config: ModelConfig) -> DCFormer:
    with torch.device("meta"):
        return DCFormer(config)


def _part(name: str) -> str:
    for part, mark in (("compose", ".compose."), ("norm", "norm."), ("attention", ".attention."), ("ffn", ".ffn.")):
        if mark in name:
            return part
    return name.partition(".")[0]


def _mixing_flops_per_pair(compose: ComposeProjection) -> int:
    low_rank = 0 if compose.dw1 is None else 4 * compose.rank * compose.heads
    gates = 0 if compose.dd is None else 2 * compose.heads
    return len(compose.branches) * (low_rank + gates)
