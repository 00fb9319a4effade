"""The fused backend as custom operators of torch, and whether they can run. Triton is imported when they do.

torch.compile and activation checkpointing see one call forward and one backward. Saved for backward are the inputs and
the softmax's row statistics, float32 [B, H, 2, T]: the peak of the logits, and log(sum(exp(logit - peak))).

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import define_operator
from dcscale.ops.compose.triton.tiles import MAX_RANK, TABLE
from dcscale.ops.compose.weights import ComposeWeights


def unavailable_reason(q_BTHD: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None) -> str | None:
    """Why :func:`triton_attention` cannot run for these arguments; None if it can."""
    if q_BTHD.dtype == torch.float64:
        return "it computes in float32, and q is torch.float64"
    for stage, weights in (("pre", pre), ("post", post)):
        for name, tensor in ({} if weights is None else weights.tensors()).items():
            if name[1] != "g" and tensor.shape[2] > MAX_RANK:
                return f"it takes ranks up to {MAX_RANK}, and {stage}.{name} has shape {tuple(tensor.shape)}"
    return _machine_obstacle(q_BTHD.device.type, q_BTHD.device.index)


@torch.compiler.assume_constant_result
def _machine_obstacle(device_type: str, index: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if device_type == "cuda":
        if torch.version.hip is not None:
            return "it was made for NVIDIA GPUs"
        major, minor = torch.cuda.get_device_capability(index)
        if 10 * major + minor < min(TABLE):
            return f"it needs compute capability {min(TABLE) / 10}, and the GPU has {major}.{minor}"
    elif device_type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs an NVIDIA GPU (or TRITON_INTERPRET=1, for tests), and q is on {device_type}"
    return None


def _staged(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *others: Any) -> Any:
    from dcscale.ops.compose.triton.staging import StagedAttention

    *weights, document_ids_BS, window, scale, query_offset, scratch_bytes = others
    return StagedAttention(q_BTHD, k_BSGD, v_BSGD, weights, document_ids_BS, window, scale, query_offset, scratch_bytes)


def _forward(*arguments: Any) -> list[Tensor]:
    with torch.cuda.device_of(arguments[0]):
        return list(_staged(*arguments).forward())


def _backward(dout_BTHD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor | None]:
    with torch.cuda.device_of(dout_BTHD):
        return _staged(*arguments).backward(dout_BTHD, *kept)


def _statistics(q_BTHD: Tensor) -> list[Tensor]:
    batch, queries, heads, _ = q_BTHD.shape
    return [q_BTHD.new_empty((batch, heads, 2, queries), dtype=torch.float32)]


triton_attention = define_operator("compose_triton", _forward, _backward, _statistics)
