"""Registers the forward and backward functions of a compose attention backend as custom torch operators.

torch.compile and activation checkpointing then see one call in each direction, not the loops and kernels inside.
torch.library wants flat argument lists; this module is the only place that knows their order, everything else passes
a :class:`Call`.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.weights import ComposeWeights

SCRATCH_BYTES = 2**28
"""Default scratch memory of a call."""


class Call(NamedTuple):
    """Arguments of compose attention, checked and with all defaults filled in; see :func:`compose_attention`."""

    q: Tensor
    """[B, T, H, D]."""
    k: Tensor
    """[B, S, G, D]."""
    v: Tensor
    """[B, S, G, D]."""
    pre: ComposeWeights = ComposeWeights()
    """Without any weights it is the identity."""
    post: ComposeWeights = ComposeWeights()
    document_ids: Tensor | None = None
    """Integers [B, S]."""
    causal: bool = True
    window: int | None = None
    scale: float = 1.0
    query_offset: int = 0
    scratch_bytes: int = SCRATCH_BYTES

    def differentiable(self) -> list[Tensor | None]:
        """q, k, v and the twelve weights: the inputs that have gradients, in the order of the operator."""
        return [self.q, self.k, self.v, *self.pre, *self.post]

    def to(self, dtype: torch.dtype) -> Call:
        """The same with the float tensors in another dtype."""
        pre, post = (ComposeWeights(*(None if w is None else w.to(dtype) for w in ws)) for ws in (self.pre, self.post))
        return self._replace(q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), pre=pre, post=post)


class Gradients(NamedTuple):
    """Gradients of the inputs of a :class:`Call`, in their shapes and dtypes; None for absent weights."""

    q: Tensor
    k: Tensor
    v: Tensor
    pre: ComposeWeights
    post: ComposeWeights

    @classmethod
    def empty(cls, call: Call) -> Gradients:
        """Uninitialized, contiguous gradients."""

        def empty(x: Tensor | None) -> Tensor | None:
            return None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

        pre, post = (ComposeWeights(*map(empty, weights)) for weights in (call.pre, call.post))
        return cls(empty(call.q), empty(call.k), empty(call.v), pre, post)

    def tensors(self) -> list[Tensor | None]:
        """In the order of :meth:`Call.differentiable`."""
        return [self.q, self.k, self.v, *self.pre, *self.post]


_WEIGHT_NAMES = [f"{stage}_{name}" for stage in ("pre", "post") for name in ComposeWeights._fields]
_SCHEMA = (
    "Tensor q, Tensor k, Tensor v, "
    + ", ".join(f"Tensor? {name}" for name in _WEIGHT_NAMES)
    + ", Tensor? document_ids, bool causal, int? window, float scale, int query_offset, int scratch_bytes"
)
_DIFFERENTIABLE = 3 + len(_WEIGHT_NAMES)
_TENSORS = _DIFFERENTIABLE + 1  # document_ids


def _pack(call: Call) -> tuple[Any, ...]:
    """The arguments in the order of the schema."""
    weights = (*call.pre.without_unpaired(), *call.post.without_unpaired())
    options = (call.causal, call.window, call.scale, call.query_offset, call.scratch_bytes)
    return call.q, call.k, call.v, *weights, call.document_ids, *options


def _unpack(arguments: Sequence[Any]) -> Call:
    """The inverse of :func:`_pack`."""
    q, k, v, *weights, document_ids, causal, window, scale, query_offset, scratch_bytes = arguments
    half = len(ComposeWeights._fields)
    pre, post = ComposeWeights(*weights[:half]), ComposeWeights(*weights[half:])
    return Call(q, k, v, pre, post, document_ids, causal, window, scale, query_offset, scratch_bytes)


def define_operator(
    name: str,
    forward: Callable[[Call], list[Tensor]],
    backward: Callable[[Tensor, list[Tensor], Call], Gradients],
    kept: Callable[[Tensor], list[Tensor]] = lambda q_BTHD: [],
) -> Callable[[Call], Tensor]:
    """Register a backend as an operator of torch.

    Args:
        name: of the operator, in torch.ops.dcscale; the operator of the backward pass is called ``name`` + "_backward".
        forward: returns the output [B, T, H, D], and what backward needs besides the inputs. In the calls that it gets,
            low-rank factors come in pairs.
        backward: (gradient of the output, what forward kept, the call) -> the gradients.
        kept: maps q to empty tensors of the shapes and dtypes that forward keeps.

    Returns:
        The differentiable function: a call -> its output [B, T, H, D] in q's dtype.
    """

    def run_forward(*arguments: Any) -> list[Tensor]:
        return forward(_unpack(arguments))

    def run_backward(dout_BTHD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        # An operator cannot return optional tensors, so drop the absent ones.
        return [x for x in backward(dout_BTHD, kept, _unpack(arguments)).tensors() if x is not None]

    forward_op = torch.library.custom_op(
        f"dcscale::{name}", run_forward, mutates_args=(), schema=f"({_SCHEMA}) -> Tensor[]"
    )
    backward_op = torch.library.custom_op(
        f"dcscale::{name}_backward",
        run_backward,
        mutates_args=(),
        schema=f"(Tensor dout, Tensor[] kept, {_SCHEMA}) -> Tensor[]",
    )

    # Shapes and dtypes only, for tracing; the results must be contiguous like the real ones.
    @forward_op.register_fake
    def _(*arguments: Any) -> list[Tensor]:
        q_BTHD = _unpack(arguments).q
        return [q_BTHD.new_empty(q_BTHD.shape), *kept(q_BTHD)]

    @backward_op.register_fake
    def _(dout_BTHD: Tensor, kept: list[Tensor], *arguments: Any) -> list[Tensor]:
        return [x.new_empty(x.shape) for x in _unpack(arguments).differentiable() if x is not None]

    def setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
        ctx.options = inputs[_TENSORS:]

    def differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: activation checkpointing does not provide them twice
        tensors, kept = saved[:_TENSORS], list(saved[_TENSORS:])
        present = iter(backward_op(gradients[0], kept, *tensors, *ctx.options))
        of_tensors = [None if x is None else next(present) for x in tensors[:_DIFFERENTIABLE]]
        # One gradient for each argument: None for document_ids and the options.
        return (*of_tensors, None, *[None] * len(ctx.options))

    forward_op.register_autograd(differentiate, setup_context=setup_context)

    def attention(call: Call) -> Tensor:
        """Compose attention of a checked call -> [B, T, H, D] in q's dtype."""
        return forward_op(*_pack(call))[0]

    return attention
