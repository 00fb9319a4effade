"""Tests once per process that the kernels, as compiled on this machine, give correct results, before they are used.

Compilers have bugs: ptxas before 13.3 can miscompile matrix products on Hopper with an operand in registers (triton
issues 9433 and 11781). These kernels have no such products (products.py), and checking versions would not catch the
next bug. So the kernels that a call needs run on a small input with several tiles, with and without a window, with
documents, and the output and every gradient must agree with the reference in float64.

Axes in names: B batch, T queries and keys, H heads, D head width, R rank.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.reference import reference_attention
from dcscale.ops.compose.triton.op import triton_attention
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.flash import assume_constant_result

LENGTH, WINDOW, DOCUMENT = 300, 90, 60
"""Of the input: positions, keys that a query sees, and positions of the first document."""


class Kernels(NamedTuple):
    """What determines the kernels that a call needs."""

    device: str
    dtype: str
    heads: int
    kv_heads: int
    head_dim: int
    pre: tuple[int, ...]
    """For q1, q2, qg, k1, k2, kg: the rank, 1 for a gate, 0 if absent."""
    post: tuple[int, ...]


def self_test_failure(
    q: Tensor, pre: ComposeWeights | None, post: ComposeWeights | None, kv_heads: int | None = None
) -> str | None:
    """What is wrong with the kernels that a call with these arguments needs; None if they are correct.

    Compiles them, which takes seconds the first time on a machine, and runs them once per process. ``kv_heads`` is q's
    number of heads by default.
    """
    kv_heads = q.shape[2] if kv_heads is None else kv_heads
    sizes = [
        (0,) * 6 if stage is None else tuple(0 if w is None else w.shape[2] if w.dim() == 4 else 1 for w in stage)
        for stage in (pre, post)
    ]
    return _self_test(str(q.device), str(q.dtype), q.shape[2], kv_heads, q.shape[3], *sizes)


@assume_constant_result  # outside of the cache, whose wrapper torch.compile would trace through
def _self_test(*kernels: Any) -> str | None:
    return _run_once(Kernels(*kernels))


@cache
def _run_once(kernels: Kernels) -> str | None:
    # In a thread of its own, because the caller's autocast, checkpointing, device and compiler state is thread-local.
    try:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(_compare, kernels).result()
    except torch.OutOfMemoryError:  # says nothing about the kernels, and must not decide for the rest of the process
        raise
    except Exception as error:  # a compiler, an assembler or a driver can raise anything; it is the reason to report
        return f"its kernels fail here: {type(error).__name__}: {error}"


def _compare(kernels: Kernels) -> str | None:
    dtype = getattr(torch, kernels.dtype.removeprefix("torch."))
    call, cotangent_BTHD = _inputs(kernels)
    # What changes the kernels' work besides their constants: a windowed call has rows of its own, one without may have
    # one chunk or several, and forward may keep maps for backward.
    no_window = call._replace(window=None, document_ids=None)
    variants = {
        "with a window and documents": (triton_attention, call),
        "without window": (triton_attention, no_window),
        "without window, in chunks": (triton_attention, no_window._replace(scratch_bytes=1)),
        "with a window and kept maps": (_keeping_attention, call),
    }
    results, expected = {}, {}
    for kind, (function, of_kind) in variants.items():
        for found, operator, precision in (
            (results, function, dtype),
            (expected, reference_attention, torch.float64),
        ):
            of_call = _run(operator, of_kind, cotangent_BTHD, precision)
            found |= {f"{name} {kind}": x for name, x in of_call.items()}
    # Bugs cause gross errors. Allow rounding of the input, of intermediate results and, if enabled, of TF32 products.
    narrow = torch.bfloat16 if torch.backends.cuda.matmul.allow_tf32 and dtype == torch.float32 else dtype
    bound = max(1e-4, 8 * torch.finfo(narrow).eps)
    for name, result in results.items():
        # A factor without its partner does not affect the result and has a gradient of 0: compare absolutely then.
        error = ((result - expected[name]).norm() / (expected[name].norm() or 1.0)).item()
        if not error <= bound:  # also if it is NaN
            return (
                f"its kernels, as compiled here, are wrong: {name} is off by {error:.1e} of its norm, "
                f"more than {bound:.1e} ({kernels})"
            )
    return None


def _keeping_attention(call: Call) -> Tensor:
    """As in a recomputed forward pass under activation checkpointing, with room to keep what backward needs."""
    with_room = call._replace(scratch_bytes=2**62)
    return checkpoint(lambda *_: triton_attention(with_room), call.q, use_reentrant=False)


def _run(function: Any, call: Call, cotangent_BTHD: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The output and all gradients in float64, computed in ``dtype``, by name."""

    def leaf(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(dtype).requires_grad_()

    pre, post = (ComposeWeights(*map(leaf, stage)) for stage in (call.pre, call.post))
    call = call._replace(q=leaf(call.q), k=leaf(call.k), v=leaf(call.v), pre=pre, post=post)
    names = ["q", "k", "v", *(f"{stage}.{name}" for stage in ("pre", "post") for name in ComposeWeights._fields)]
    leaves = {f"the gradient of {name}": x for name, x in zip(names, call.differentiable()) if x is not None}
    with torch.enable_grad():
        out_BTHD = function(call)
        gradients = torch.autograd.grad(
            out_BTHD, list(leaves.values()), cotangent_BTHD.to(dtype), materialize_grads=True
        )
    results = {"the output": out_BTHD.detach(), **dict(zip(leaves, gradients))}
    return {name: x.double() for name, x in results.items()}


def _inputs(kernels: Kernels) -> tuple[Call, Tensor]:
    """A call with normal random tensors whose compose changes the result a lot, and the gradient of the output."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        # Rounded to bfloat16, which float32 and float64 hold exactly, so that the input is the same in all dtypes.
        return (std * torch.randn(1, LENGTH, *shape, generator=generator)).bfloat16().to(kernels.device)

    head_dim, heads = kernels.head_dim, kernels.heads
    q, k, v = (normal(count, head_dim) for count in (heads, kernels.kv_heads, kernels.kv_heads))
    stages = []
    for sizes in (kernels.pre, kernels.post):
        weights: dict[str, Tensor | None] = {}
        for name, size in zip(ComposeWeights._fields, sizes):
            shape = (heads,) if name[1] == "g" else (size, heads)
            std = {"1": 1.0, "2": 0.5 * heads**-0.5, "g": 0.5}[name[1]]
            weights[name] = normal(*shape, std=std) if size else None
        stages.append(ComposeWeights(**weights))
    documents_BT = (torch.arange(LENGTH, device=kernels.device) >= DOCUMENT)[None].int()
    call = Call(q, k, v, *stages, document_ids=documents_BT, window=WINDOW, scale=head_dim**-0.5)
    return call, normal(heads, head_dim)
