"""A forward and a backward function of compose attention as custom operators of torch.

torch.compile and activation checkpointing then see one call each way, not the loops and kernels inside.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dcscale.ops.compose.weights import ComposeWeights

_WEIGHTS = [f"{stage}_{name}" for stage in ("pre", "post") for name in ComposeWeights._fields]
DIFFERENTIABLE = 3 + len(_WEIGHTS)
"""Of the arguments: q, k, v and the twelve weights; document ids, window, scale, query offset, scratch bytes follow."""
TENSORS = DIFFERENTIABLE + 1
SCRATCH_BYTES = 2**28
"""Scratch of a call unless told otherwise."""
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, "
    + ", ".join(f"Tensor? {name}" for name in _WEIGHTS)
    + ", Tensor? document_ids, int? window, float scale, int query_offset, int scratch_bytes"
)


def complete_terms(weights: ComposeWeights | None) -> list[Tensor | None]:
    """q1, q2, qg, k1, k2, kg, without a low-rank factor whose partner is missing."""
    if weights is None:
        return [None] * 6
    terms = []
    for into, out_of, gate in ((weights.q1, weights.q2, weights.qg), (weights.k1, weights.k2, weights.kg)):
        complete = into is not None and out_of is not None
        terms += [into, out_of, gate] if complete else [None, None, gate]
    return terms


def define_operator(
    name: str,
    forward: Callable[..., list[Tensor]],
    backward: Callable[..., list[Tensor | None]],
    kept: Callable[[Tensor], list[Tensor]] = lambda q_BTHD: [],
) -> Callable[..., Tensor]:
    """The function that a backend is, from its two directions.

    Args:
        name: of the operator, in torch.ops.dcscale; that of backward ends in ``_backward``.
        forward: (q, k, v, the weights as :func:`complete_terms` gives them for pre and post, document ids, window,
            scale, query offset, scratch bytes) -> [the output [B, T, H, D], and what backward needs beside these].
        backward: (gradient of the output, what forward kept, the arguments of forward) -> the gradients of q, k, v and
            the weights; None for a weight that is not there.
        kept: empty tensors like those which forward keeps, from q.
    """
    forward_op = torch.library.custom_op(
        f"dcscale::{name}", forward, mutates_args=(), schema=f"({_SCHEMA}) -> Tensor[]"
    )

    def present(dout_BTHD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        return [x for x in backward(dout_BTHD, kept, *arguments) if x is not None]

    backward_op = torch.library.custom_op(
        f"dcscale::{name}_backward",
        present,
        mutates_args=(),
        schema=f"(Tensor dout, Tensor[] kept, {_SCHEMA}) -> Tensor[]",
    )

    @forward_op.register_fake
    def _(q_BTHD: Tensor, *_: Any) -> list[Tensor]:
        return [q_BTHD.new_empty(q_BTHD.shape), *kept(q_BTHD)]

    @backward_op.register_fake
    def _(dout_BTHD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in arguments[:DIFFERENTIABLE] if x is not None]

    def save(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:TENSORS], *output[1:])
        ctx.numbers = inputs[TENSORS:]

    def differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: activation checkpointing does not give them twice
        tensors, kept = saved[:TENSORS], list(saved[TENSORS:])
        found = iter(backward_op(gradients[0], kept, *tensors, *ctx.numbers))
        of_tensors = [None if x is None else next(found) for x in tensors[:DIFFERENTIABLE]]
        return (*of_tensors, *[None] * (1 + len(ctx.numbers)))

    forward_op.register_autograd(differentiate, setup_context=save)

    def attention(
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
        scratch_bytes: int,
    ) -> Tensor:
        """Arguments as :func:`dcscale.ops.compose_attention`, already checked -> [B, T, H, D] in q's type."""
        weights = complete_terms(pre) + complete_terms(post)
        numbers = (window, scale, query_offset, scratch_bytes)
        return forward_op(q_BTHD, k_BSGD, v_BSGD, *weights, document_ids_BS, *numbers)[0]

    return attention
