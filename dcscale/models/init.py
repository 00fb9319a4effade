"""Initial values of every parameter, by name.

A parameter's values depend only on the seed, its name and its shape: not on other parameters, the number of ranks, the
ZeRO stage or the device. Runs that differ only in these start from the same weights.

Sources of the rules (upstream is Caiyun-AI/DCFormer, JAX, which trained the released weights):

==============================================  ============================================================
embedding, output, attention and FFN matrices   normal, std 0.006, residual outputs included
                                                (``NormalInitializer(0.006)`` in models.py and dcformer.py);
                                                times 1024 / E below upstream's widths, see below
compose.dw1                                     normal, std sqrt(2 / (E + K)), K = 2*R*H (dc_attentions.py)
compose.qkw                                     normal, std 0.02 / (sqrt(K) * (H + R)) (dc_attentions.py)
compose.dd                                      normal, std gate_init * sqrt(2 / (E + H)) (dc_attentions.py)
norm scales; all biases                         1; 0
==============================================  ============================================================

With these values compose starts near the identity: w1 is normalised, w2 and the gates are of the order of 1e-2 to 1e-3.

Upstream's 0.006 is for its widths of 1024 to 4096; a narrow model learns much more slowly with it. Example: 4 layers of
width 192 on Python source, after 350 steps of 1024 bytes, have a loss of 2.06 nats/byte with 0.006, and of 1.78 with
0.006 * 1024 / 192.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from dcscale.config.schema import ComposeConfig, ModelConfig

MATRIX_STD = 0.006
"""Standard deviation of matrices from upstream's smallest width on."""

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
    """Sets every parameter of ``model``, a :class:`DCFormer` of ``config``. Values are drawn in float32 on the CPU.

    Args:
        seed: of the random values.
        gather: returns a context in which the full data of these parameters is present and can be written. Needed for
            ZeRO-3, where every rank enters it.

    Raises:
        ValueError: a parameter has no rule, or no data.
    """
    for name, parameter in model.named_parameters():
        with gather([parameter]):
            if parameter.is_meta or parameter.numel() == 0:
                raise ValueError(
                    f"{name} ({list(parameter.shape)} on {parameter.device}) has no data to initialize: build the "
                    f"model on a real device, and pass a gather that collects partitioned parameters"
                )
            parameter.copy_(initial_values(name, parameter.shape, config, seed))


def initial_values(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> torch.Tensor:
    """Initial values, float32, of the parameter ``name`` with this shape."""
    if _NORM.fullmatch(name):
        return torch.ones(shape)
    if name.endswith(".bias"):
        return torch.zeros(shape)
    # The name is part of the seed: a model with more layers has the same values in those that both have.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.randn(shape, generator=generator).mul_(standard_deviation(name, config))


def compose_deviations(dim: int, heads: int, compose: ComposeConfig) -> dict[str, float]:
    """Standard deviations of the parameters of a ComposeProjection, by the rules in the module's docstring."""
    hidden = 2 * compose.rank * heads
    return {
        "dw1": math.sqrt(2 / (dim + hidden)),
        "qkw": 0.02 / (math.sqrt(hidden) * (heads + compose.rank)),
        "dd": compose.gate_init * math.sqrt(2 / (dim + heads)),
    }


def standard_deviation(name: str, config: ModelConfig) -> float:
    """Standard deviation of a matrix's initial values, by the rules in the module's docstring.

    Raises:
        ValueError: no rule matches the name.
    """
    if _MATRIX.fullmatch(name):
        return min(MATRIX_STD * max(1.0, SMALLEST_UPSTREAM_DIM / config.dim), LARGEST_MATRIX_STD)
    compose = compose_deviations(config.dim, config.heads, config.compose)
    owner, _, last = name.rpartition(".")
    if owner.endswith(".compose") and last in compose:
        return compose[last]
    raise ValueError(f"no initialization rule for the parameter {name!r}: add one to {__name__}")
