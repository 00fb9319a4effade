"""The Triton backend as custom torch operators, and whether it can run. Triton is imported only when it runs.

Saved for backward are the inputs and the softmax's row statistics, float32 [B, H, 2, T]: the maximum of the logits, and
log(sum(exp(logit - maximum))).

Axes in names: B batch, T queries, H query heads, D head width.
"""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import Call, Gradients, define_operator
from dcscale.ops.compose.triton.tiles import MAX_RANK, TABLE
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.flash import assume_constant_result


def unavailable_reason(q_BTHD: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None) -> str | None:
    """Why :func:`triton_attention` cannot run for these arguments; None if it can."""
    if q_BTHD.dtype == torch.float64:
        return "it computes in float32, but q is torch.float64"
    for stage, weights in (("pre", pre), ("post", post)):
        for name, tensor in ({} if weights is None else weights.tensors()).items():
            # Gates have no rank.
            if name[1] != "g" and tensor.shape[2] > MAX_RANK:
                return f"it supports ranks up to {MAX_RANK}, but {stage}.{name} has shape {tuple(tensor.shape)}"
    return _device_unavailable_reason(q_BTHD.device.type, q_BTHD.device.index)


@assume_constant_result
def _device_unavailable_reason(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type == "cuda":
        if torch.version.hip is not None:
            return "it supports NVIDIA GPUs only, and this torch is built for ROCm"
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < min(TABLE):
            return f"it needs compute capability {min(TABLE) / 10}, but the GPU has {major}.{minor}"
    # On a CPU the kernels run only in Triton's interpreter.
    elif device_type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests), but q is on {device_type}"
    return None


def _forward(call: Call) -> list[Tensor]:
    from dcscale.ops.compose.triton.staging import StagedAttention

    with torch.cuda.device_of(call.q):
        return list(StagedAttention(call).forward())


def _backward(dout_BTHD: Tensor, kept: list[Tensor], call: Call) -> Gradients:
    from dcscale.ops.compose.triton.staging import StagedAttention

    (statistics_BH2T,) = kept
    with torch.cuda.device_of(dout_BTHD):
        return StagedAttention(call).backward(dout_BTHD, statistics_BH2T)


def _empty_statistics(q_BTHD: Tensor) -> list[Tensor]:
    batch, queries, heads, _ = q_BTHD.shape
    return [q_BTHD.new_empty((batch, heads, 2, queries), dtype=torch.float32)]


triton_attention = define_operator("compose_triton", _forward, _backward, _empty_statistics)
