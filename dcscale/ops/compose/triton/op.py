"""The Triton backend as custom torch operators, and whether it can run. Triton is imported only when it runs.

Saved for backward are the inputs and the log-sums of the rows of logits, a float32 number for each query and head.

Axes in names: B batch, T queries, H query heads, D head width.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import Call, Gradients, define_operator
from dcscale.ops.compose.triton.tiles import MAX_RANK, TABLE, log_sums_shape, tiles_for
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


class _Recomputed(NamedTuple):
    """What a forward pass inside a backward pass has kept for the backward pass of the same call.

    Under activation checkpointing that comes next on the same device, as far as this operator is concerned. Autograd
    cannot carry these tensors: outputs must have the same shapes in every forward pass, and all but this one would
    waste them.
    """

    log_sums: Tensor
    kept: Sequence[Any]


_recomputed: dict[torch.device, _Recomputed] = {}
"""By device, the last one that has not been used."""


def _take_recomputed(log_sums: Tensor) -> Sequence[Any]:
    """What was kept with these log-sums, recognized by their memory; nothing stays."""
    found = _recomputed.pop(log_sums.device, None)
    return found.kept if found is not None and found.log_sums.data_ptr() == log_sums.data_ptr() else ()


def _in_backward() -> bool:
    """Whether autograd is running a backward pass in this thread, as in torch.utils.checkpoint."""
    return torch._C._current_graph_task_id() != -1


def _forward(call: Call) -> list[Tensor]:
    from dcscale.ops.compose.triton.staging import StagedAttention

    _recomputed.pop(call.q.device, None)  # its backward pass failed, or needed it no more: free its memory first
    with torch.cuda.device_of(call.q):
        staged = StagedAttention(call)
        kept = [] if _in_backward() and staged.keeps else None
        out_BTHD, log_sums = staged.forward(kept)
    if kept:
        _recomputed[call.q.device] = _Recomputed(log_sums, kept)
    return [out_BTHD, log_sums]


def _backward(dout_BTHD: Tensor, saved: list[Tensor], call: Call) -> Gradients:
    from dcscale.ops.compose.triton.staging import StagedAttention

    (log_sums,) = saved
    with torch.cuda.device_of(dout_BTHD):
        return StagedAttention(call).backward(dout_BTHD, log_sums, _take_recomputed(log_sums))


def _empty_log_sums(q_BTHD: Tensor) -> list[Tensor]:
    batch, queries, heads, _ = q_BTHD.shape
    tiles = tiles_for(max(TABLE), MAX_RANK, q_BTHD.element_size())
    return [q_BTHD.new_empty(log_sums_shape(batch, queries, heads, tiles), dtype=torch.float32)]


triton_attention = define_operator("compose_triton", _forward, _backward, _empty_log_sums)
