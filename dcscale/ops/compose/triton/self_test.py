"""Whether the kernels, as this machine's compiler made them, do what they should: tried once, before they are used.

Compilers have faults: an assembler older than 13.3 can miscompile products on Hopper whose operand is in registers
(triton issues 9433 and 11781). These kernels have no such product, and a version tells nothing about the next fault.
So the kernels that a call needs run on a small input with several tiles, a window and documents, and the output and
every gradient must agree with the definition in float64.

Axes in names: B batch, T queries and keys, H heads, D head width, R rank.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import SCRATCH_BYTES
from dcscale.ops.compose.reference import reference_attention
from dcscale.ops.compose.triton.op import triton_attention
from dcscale.ops.compose.weights import ComposeWeights

LENGTH, WINDOW, DOCUMENT = 150, 90, 60
"""Positions of the input, keys that a query sees, and the length of its first document."""


class Kernels(NamedTuple):
    """What decides which kernels a call needs."""

    device: str
    dtype: str
    heads: int
    head_dim: int
    pre: tuple[int, ...]
    """Of q1, q2, qg, k1, k2, kg: the rank, 1 for a gate, 0 for what is not there."""
    post: tuple[int, ...]


def self_test_failure(q: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None) -> str | None:
    """What is wrong with the kernels that a call with these needs; None if nothing is.

    Compiles them, which takes seconds the first time on a machine, and runs them once a process.
    """
    sizes = [
        (0,) * 6 if stage is None else tuple(0 if w is None else w.shape[2] if w.dim() == 4 else 1 for w in stage)
        for stage in (pre, post)
    ]
    return _wrong_result(str(q.device), str(q.dtype), q.shape[2], q.shape[3], *sizes)


@torch.compiler.assume_constant_result  # around the cache, which torch.compile would look through
def _wrong_result(*kernels: Any) -> str | None:
    return _try(Kernels(*kernels))


@cache
def _try(kernels: Kernels) -> str | None:
    # What is set around the call is set for its thread: autocast, activation checkpointing, a device, a compiler.
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_compare, kernels).result()
    except Exception as error:  # whatever a compiler, an assembler or a driver raises is the answer, and is passed on
        return f"its kernels fail here: {type(error).__name__}: {error}"


def _compare(kernels: Kernels) -> str | None:
    dtype = getattr(torch, kernels.dtype.removeprefix("torch."))
    tensors, cotangent_BTHD = _inputs(kernels)
    documents_BT = (torch.arange(LENGTH, device=kernels.device) >= DOCUMENT)[None].int()
    options = {"window": WINDOW, "scale": kernels.head_dim**-0.5, "document_ids_BS": documents_BT, "query_offset": 0}
    found = {}
    runs = (
        (triton_attention, dtype, {"scratch_bytes": SCRATCH_BYTES}),
        (reference_attention, torch.float64, {}),
    )
    for function, work_type, budget in runs:
        leaves = [None if x is None else x.to(work_type).requires_grad_() for x in tensors]
        q, k, v, *weights = leaves
        pre, post = ComposeWeights(*weights[:6]), ComposeWeights(*weights[6:])
        with torch.enable_grad():
            out_BTHD = function(q, k, v, pre, post, **options, **budget)
            there = [x for x in leaves if x is not None]
            gradients = torch.autograd.grad(out_BTHD, there, cotangent_BTHD.to(work_type), materialize_grads=True)
        found[function] = [x.double() for x in (out_BTHD.detach(), *gradients)]
    names = ["q", "k", "v", *(f"{stage}.{name}" for stage in ("pre", "post") for name in ComposeWeights._fields)]
    there = ["the output", *(f"the gradient of {name}" for name, x in zip(names, tensors) if x is not None)]
    # Faults are gross; rounding of the input, of staged maps and, where that is allowed, of TF32 products is not.
    narrow = torch.bfloat16 if torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32 else dtype
    bound = max(1e-4, 8 * torch.finfo(narrow).eps)
    for name, result, expected in zip(there, found[triton_attention], found[reference_attention]):
        # A factor without its partner has no part in the result, and a gradient of 0.
        error = ((result - expected).norm() / (expected.norm() or 1.0)).item()
        if not error <= bound:  # also when it is NaN
            return (
                f"its kernels, as compiled here, are wrong: {name} is off by {error:.1e} of its norm, "
                f"more than {bound:.1e} ({kernels})"
            )
    return None


def _inputs(kernels: Kernels) -> tuple[list[Tensor | None], Tensor]:
    """q, k, v and the twelve weights, and the gradient of the output: normal, of a size that composes a lot."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        # Rounded to what every type holds, so that it is the same input in all.
        return (std * torch.randn(1, LENGTH, *shape, generator=generator)).bfloat16().to(kernels.device)

    width, heads = kernels.head_dim, kernels.heads
    tensors: list[Tensor | None] = [normal(heads, width) for _ in range(3)]
    for sizes in (kernels.pre, kernels.post):
        for name, size in zip(ComposeWeights._fields, sizes):
            shape = (heads,) if name[1] == "g" else (size, heads)
            std = {"1": 1.0, "2": 0.5 * heads**-0.5, "g": 0.5}[name[1]]
            tensors.append(normal(*shape, std=std) if size else None)
    return tensors, normal(heads, width)
