"""Parameter and FLOP counts of a model, including compose, computed on the meta device."""

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
        """Sum over all parts."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class ParameterCount(_Breakdown):
    """Number of parameters by part. A tied output matrix counts once, as embedding."""

    embedding: int = 0
    attention: int = 0
    """Matrices and biases of q, k, v and out."""
    compose: int = 0
    """dw1, qkw and dd: 20*E*H + 64*H^2 per layer at rank 2 with all parts switched on."""
    ffn: int = 0
    norm: int = 0
    """Norms of blocks, q, k and the output."""
    output: int = 0


@dataclass(frozen=True)
class FlopCount(_Breakdown):
    """Floating-point operations per token of a training step: forward and backward, which is 3 x forward.

    A multiply-add counts as two. Counts matrix products, attention and compose, but not norms, activations, softmax and
    the embedding look-up. Recomputation is never counted, so that MFU is comparable between settings.
    """

    attention_projections: float = 0.0
    scores: float = 0.0
    """q k^T and P v over the visible keys: 4*H*D per (query, key) pair in the forward pass."""
    compose_projection: float = 0.0
    """Computing the compose weights from the layer's input."""
    compose_apply: float = 0.0
    """Composing scores and probabilities: in the forward pass 4*R*H for the low-rank part and 2*H for the gate, per
    visible pair and active branch; 40*H per pair at rank 2 with all parts switched on."""
    ffn: float = 0.0
    output: float = 0.0


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Parameters of the model that ``config`` describes.

    Raises:
        ValueError: the settings do not describe a valid model.
    """
    counts = dict.fromkeys((part.name for part in fields(ParameterCount)), 0)
    for name, parameter in _meta_model(config).named_parameters():
        counts[_part(name)] += parameter.numel()
    return ParameterCount(**counts)


def count_flops(config: ModelConfig, sequence_length: int) -> FlopCount:
    """FLOPs per token, for sequences of ``sequence_length`` tokens that are one document each.

    Only visible pairs count: the query at position t (from 0) sees min(t + 1, window) keys.

    Raises:
        ValueError: the settings do not describe a valid model, or ``sequence_length`` is below 1.
    """
    if sequence_length < 1:
        raise ValueError(f"sequence_length is {sequence_length}, but must be 1 or more")
    model = _meta_model(config)
    matrices = dict.fromkeys((part.name for part in fields(ParameterCount)), 0)
    for name, parameter in model.named_parameters():
        # A matrix multiplies each token once. Vectors are norms and biases, which are not counted.
        matrices[_part(name)] += parameter.numel() if parameter.dim() > 1 else 0
    scores = composing = 0.0
    for block in model.blocks:
        # Average number of keys per query.
        keys = visible_pairs(sequence_length, block.attention.window) / sequence_length
        scores += keys * 4 * config.heads * block.attention.head_dim
        if block.attention.compose is not None:
            composing += keys * _compose_flops_per_pair(block.attention.compose)
    forward = {
        "attention_projections": 2 * matrices["attention"],
        "scores": scores,
        "compose_projection": 2 * matrices["compose"],
        "compose_apply": composing,
        "ffn": 2 * matrices["ffn"],
        "output": 2 * model.output.weight.numel(),  # not from ``matrices``, where a tied weight is the embedding's
    }
    return FlopCount(**{part: 3.0 * flops for part, flops in forward.items()})


def _meta_model(config: ModelConfig) -> DCFormer:
    with torch.device("meta"):
        return DCFormer(config)


def _part(name: str) -> str:
    """The field of ``ParameterCount`` that a parameter belongs to."""
    for part, mark in (("compose", ".compose."), ("norm", "norm."), ("attention", ".attention."), ("ffn", ".ffn.")):
        if mark in name:
            return part
    return name.partition(".")[0]


def _compose_flops_per_pair(compose: ComposeProjection) -> int:
    low_rank = 0 if compose.dw1 is None else 4 * compose.rank * compose.heads
    gates = 0 if compose.dd is None else 2 * compose.heads
    return len(compose.branches) * (low_rank + gates)
