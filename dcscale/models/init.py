"""Initial values of every parameter, by name.

A parameter's values depend on the seed, its name and its shape only: not on other parameters, the number
of ranks, the ZeRO stage or the device. So a run with other settings of these starts from the same weights.

Where the rules come from (upstream is Caiyun-AI/DCFormer, JAX, which trained the released weights):

==============================================  ============================================================
embedding, output, attention and FFN matrices   normal, std 0.006, residual outputs included
                                                (``NormalInitializer(0.006)`` in models.py and dcformer.py);
                                                times 1024 / E below upstream's widths, see below
compose.dw1                                     normal, std sqrt(2 / (E + K)), K = 2*R*H (dc_attentions.py)
compose.qkw                                     normal, std 0.02 / (sqrt(K) * (H + R)) (dc_attentions.py)
compose.dd                                      normal, std gate_init * sqrt(2 / (E + H)) (dc_attentions.py)
norm scales; all biases                         1; 0
==============================================  ============================================================

With these compose starts near the identity: w1 is normalised, w2 and the gates are of the order 1e-2 to 1e-3.

Upstream's 0.006 belongs to its widths of 1024 to 4096. A narrow model learns far slower from it: 4 layers of width
192 on Python source, 350 steps of 1024 bytes, end at a loss of 2.06 a byte, and at 1.78 with 0.006 * 1024 / 192.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dcscale.config.schema import ModelConfig

MATRIX_STD = 0.006
"""Standard deviation of matrices at upstream's widths."""

SMALLEST_UPSTREAM_DIM = 1024
LARGEST_MATRIX_STD = 0.05

_MATRIX = re.compile(r"(embedding|output|blocks\.\d+\.(attention\.[qkv]|attention\.out|ffn\.\w+))\.weight")
_NORM = re.compile(r"(.+\.)?(\w+_)?norm\.weight")


@torch.no_grad()
def initialize(
    model: nn.Module,
    config: ModelConfig,
    seed: int,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager] = lambda parameters: nullcontext(),
) -> None:
    """Set every parameter of ``model``, a :class:`DCFormer` of ``config``.

    ``gather(parameters)`` gives a context in which these parameters' full data is present and may be
    written: for ZeRO-3, where it is called on every rank. Values are drawn in float32 on the CPU.

    Raises ValueError for a parameter without a rule, or without its data.
    """
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            if parameter.is_meta or parameter.numel() == 0:
                raise ValueError(
                    f"{name} ({list(parameter.shape)} on {parameter.device}) holds no data to initialize: build the "
                    f"model on a real device, and pass a gather that makes partitioned parameters whole"
                )
            parameter.copy_(initial_values(name, parameter.shape, config, seed))


def initial_values(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """The float32 values that parameter ``name`` of this shape starts from."""
    if _NORM.fullmatch(name):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator).mul_(standard_deviation(name, config))


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's initial values; the rules are in the module's docstring."""
    if _MATRIX.fullmatch(name):
        return min(MATRIX_STD * max(1.0, SMALLEST_UPSTREAM_DIM / config.dim), LARGEST_MATRIX_STD)
    rank, heads, dim = config.compose.rank, config.heads, config.dim
    hidden = 2 * rank * heads
    compose = {
        "dw1": math.sqrt(2 / (dim + hidden)),
        "qkw": 0.02 / (math.sqrt(hidden) * (heads + rank)),
        "dd": config.compose.gate_init * math.sqrt(2 / (dim + heads)),
    }
    owner, _, last = name.rpartition(".")
    if owner.endswith(".compose") and last in compose:
        return compose[last]
    raise ValueError(f"no initialization rule for the parameter {name!r}: add one to {__name__}")
