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

from dcscale.ops.compose.chunked import complete_terms
from dcscale.ops.compose.triton_tiles import MAX_RANK, TABLE
from dcscale.ops.compose.weights import ComposeWeights

_WEIGHTS = [f"{stage}_{name}" for stage in ("pre", "post") for name in ComposeWeights._fields]
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, "
    + ", ".join(f"Tensor? {name}" for name in _WEIGHTS)
    + ", Tensor? document_ids, int? window, float scale, int query_offset"
)
_DIFFERENTIABLE = 3 + len(_WEIGHTS)
_TENSORS = _DIFFERENTIABLE + 1


def obstacle(q_BTHD: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None) -> str | None:
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


def triton_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    pre: ComposeWeights | None,
    post: ComposeWeights | None,
    *,
    window: int | None,
    scale: float,
    document_ids_BS: Tensor | None,
    query_offset: int,
) -> Tensor:
    """Arguments as :func:`dcscale.ops.compose_attention`, already checked -> [B, T, H, D] in q's type."""
    weights = complete_terms(pre) + complete_terms(post)
    return _forward_op(q_BTHD, k_BSGD, v_BSGD, *weights, document_ids_BS, window, scale, query_offset)[0]


def _staged(q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *others: Any) -> Any:
    from dcscale.ops.compose.triton_staged import StagedAttention

    *weights, document_ids_BS, window, scale, query_offset = others
    return StagedAttention(q_BTHD, k_BSGD, v_BSGD, weights, document_ids_BS, window, scale, query_offset)


def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(arguments[0]):
        return _staged(*arguments).forward()


def _backward(dout_BTHD: Tensor, statistics_BH2T: Tensor, *arguments: Any) -> list[Tensor]:
    """The gradients of q, k, v and of the weights that are present."""
    with torch.cuda.device_of(dout_BTHD):
        gradients = _staged(*arguments).backward(dout_BTHD, statistics_BH2T)
    return [gradient for gradient in gradients if gradient is not None]


_forward_op = torch.library.custom_op(
    "dcscale::compose_triton", _forward, mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor, Tensor)"
)
_backward_op = torch.library.custom_op(
    "dcscale::compose_triton_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dout, Tensor statistics, {_ARGUMENTS}) -> Tensor[]",
)


@_forward_op.register_fake
def _forward_fake(q_BTHD: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, queries, heads, _ = q_BTHD.shape
    return q_BTHD.new_empty(q_BTHD.shape), q_BTHD.new_empty((batch, heads, 2, queries), dtype=torch.float32)


@_backward_op.register_fake
def _backward_fake(dout_BTHD: Tensor, statistics_BH2T: Tensor, *arguments: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in arguments[:_DIFFERENTIABLE] if x is not None]


def _save_inputs(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *inputs[:_TENSORS])
    ctx.numbers = inputs[_TENSORS:]


def _differentiate(ctx: Any, dout_BTHD: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    statistics_BH2T, *tensors = ctx.saved_tensors  # once: activation checkpointing does not give them twice
    gradients = iter(_backward_op(dout_BTHD, statistics_BH2T, *tensors, *ctx.numbers))
    of_tensors = [None if x is None else next(gradients) for x in tensors[:_DIFFERENTIABLE]]
    return (*of_tensors, *[None] * (1 + len(ctx.numbers)))


_forward_op.register_autograd(_differentiate, setup_context=_save_inputs)
