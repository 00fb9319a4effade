"""Random calls of attention, their results (output and all gradients), and how large an implementation's error may be.

The error is measured against float64 and may be a small multiple of the error of unfused PyTorch in the same dtype, as
in flash-attention's tests. So no tolerance has to be guessed for a shape or dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dcscale.ops import ComposeWeights, compose_attention
from dcscale.ops.attention import check_attention
from dcscale.ops.compose.custom_op import SCRATCH_BYTES, Call
from dcscale.ops.compose.reference import reference_attention

WEIGHTS = [f"{stage}.{name}" for stage in ("pre", "post") for name in ComposeWeights._fields]
"""Names of the twelve weights: pre.q1 ... post.kg."""

PLAIN_CALLS = {
    "causal": {"queries": 33},
    "one query": {"queries": 1},
    "window": {"queries": 300, "window": 20, "batch": 1},
    "window of one": {"queries": 9, "window": 1},
    "window of the length": {"queries": 9, "window": 9},
    "window beyond the start": {"queries": 9, "window": 30},
    "last queries": {"queries": 5, "keys": 30},
    "first queries": {"queries": 5, "keys": 30, "query_offset": 0},
    "queries in the middle": {"queries": 5, "keys": 30, "query_offset": 9, "window": 8},
    "one query at the end": {"queries": 1, "keys": 30},
    "documents": {"queries": 40, "documents": 9},
    "documents in several calls": {"queries": 600, "documents": 90, "batch": 1, "heads": 2},
    "documents, window": {"queries": 200, "documents": 30, "window": 17},
    "documents, window, last queries": {"queries": 200, "keys": 230, "documents": 30, "window": 17},
    "documents, first queries": {"queries": 20, "keys": 30, "documents": 5, "query_offset": 0},
    "grouped": {"queries": 20, "heads": 6, "kv_heads": 2},
    "grouped, window": {"queries": 20, "heads": 6, "kv_heads": 1, "window": 4},
    "grouped, documents": {"queries": 20, "heads": 6, "kv_heads": 2, "documents": 5},
    "scale": {"queries": 12, "scale": 0.7},
    "bidirectional": {"queries": 33, "causal": False},
    "bidirectional, window": {"queries": 300, "window": 20, "batch": 1, "causal": False},
    "bidirectional, window of the length": {"queries": 9, "window": 9, "causal": False},
    "bidirectional, window, middle": {"queries": 12, "keys": 40, "query_offset": 9, "window": 8, "causal": False},
    "bidirectional, window, first": {"queries": 5, "keys": 30, "query_offset": 0, "window": 50, "causal": False},
    "bidirectional, documents": {"queries": 40, "documents": 9, "causal": False},
    "bidirectional, documents, window": {"queries": 200, "documents": 30, "window": 17, "causal": False},
    "bidirectional, documents, middle": {"queries": 20, "keys": 40, "query_offset": 9, "documents": 9, "causal": False},
    "cross": {"queries": 9, "keys": 31, "causal": False},
    "cross, more queries than keys": {"queries": 31, "keys": 9, "causal": False},
    "cross, grouped": {"queries": 9, "keys": 20, "heads": 6, "kv_heads": 2, "causal": False},
}
"""Arguments of :func:`random_inputs` that cover all ways to call plain attention."""

COMPOSE_CALLS = {
    "one query": {"queries": 1},
    "seven": {"queries": 7},
    "odd": {"queries": 63, "heads": 6},
    "two chunks": {"queries": 129, "batch": 1},
    "window": {"queries": 129, "window": 16},
    "window of one": {"queries": 20, "window": 1},
    "window beyond the start": {"queries": 9, "window": 50},
    "last queries": {"queries": 7, "keys": 100},
    "one query at the end": {"queries": 1, "keys": 70, "window": 33},
    "queries in the middle": {"queries": 7, "keys": 40, "query_offset": 11},
    "documents": {"queries": 100, "documents": 9},
    "documents, window, last queries": {"queries": 70, "keys": 90, "documents": 12, "window": 20},
    "grouped": {"queries": 30, "heads": 6, "kv_heads": 2},
    "one key/value head": {"queries": 65, "heads": 4, "kv_heads": 1, "documents": 20},
    "one head": {"queries": 30, "heads": 1},
    "rank 1": {"queries": 33, "rank": 1},
    "rank 4": {"queries": 33, "rank": 4, "heads": 5, "head_dim": 7},
    "scale": {"queries": 12, "scale": 0.7},
    "bidirectional": {"queries": 70, "causal": False},
    "bidirectional, window": {"queries": 129, "window": 16, "batch": 1, "causal": False},
    "bidirectional, window, middle": {"queries": 12, "keys": 60, "query_offset": 9, "window": 20, "causal": False},
    "bidirectional, documents": {"queries": 70, "documents": 12, "causal": False},
    "bidirectional, documents, window, last": {
        "queries": 20,
        "keys": 40,
        "query_offset": 20,
        "documents": 9,
        "window": 15,
        "causal": False,
    },
    "cross": {"queries": 9, "keys": 70, "causal": False},
    "cross, more queries than keys": {"queries": 70, "keys": 9, "kv_heads": 2, "causal": False},
    "cross, one key": {"queries": 5, "keys": 1, "causal": False},
}
"""Arguments of :func:`random_inputs` that cover all ways to call compose attention."""


@dataclass
class AttentionInputs:
    """The arguments of a call of attention, and a gradient of its output."""

    tensors: dict[str, Tensor]
    """q, k, v and any of :data:`WEIGHTS`, by name."""

    cotangent: Tensor
    """Gradient of the output, [B, T, H, D]."""

    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments: causal, window, document_ids, query_offset, scale, scratch_bytes."""

    def to(self, dtype: torch.dtype, device: str | None = None) -> AttentionInputs:
        """The same in another dtype and, if given, on another device."""
        tensors = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return AttentionInputs(tensors, self.cotangent.to(device, dtype), options)

    def with_tensors(self, **tensors: Tensor) -> AttentionInputs:
        """The same with some tensors replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def call(self) -> Call:
        """The checked call, for what works on one."""
        return checked_call(*arguments(self.tensors), **self.options)

    def run(self, backend: str) -> dict[str, Tensor]:
        """Results of :func:`compose_attention`: "out", and the gradient of every tensor under the tensor's name."""
        return self.run_function(
            lambda *arguments, **options: compose_attention(*arguments, **options, backend=backend)
        )

    def run_function(self, function: Callable[..., Tensor]) -> dict[str, Tensor]:
        """As :meth:`run`, for any function with compose_attention's arguments. Unused tensors get gradients of 0."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        out = function(*arguments(leaves), **self.options)
        gradients = torch.autograd.grad(out, leaves.values(), self.cotangent, allow_unused=True, materialize_grads=True)
        return {"out": out.detach(), **dict(zip(leaves, gradients))}


def arguments(
    tensors: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor, ComposeWeights | None, ComposeWeights | None]:
    """q, k, v, pre, post from tensors by name; None for a stage without weights."""
    stages = []
    for stage in ("pre", "post"):
        weights = {name: tensors.get(f"{stage}.{name}") for name in ComposeWeights._fields}
        stages.append(None if all(w is None for w in weights.values()) else ComposeWeights(**weights))
    return tensors["q"], tensors["k"], tensors["v"], *stages


def checked_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: ComposeWeights | None = None,
    post: ComposeWeights | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
    scratch_bytes: int = SCRATCH_BYTES,
) -> Call:
    """The call that compose_attention gives to its backend for these arguments."""
    scale, query_offset = check_attention(q, k, v, causal, window, scale, document_ids, query_offset)
    return Call(
        q,
        k,
        v,
        pre=ComposeWeights() if pre is None else pre,
        post=ComposeWeights() if post is None else post,
        document_ids=document_ids,
        causal=causal,
        window=window,
        scale=scale,
        query_offset=query_offset,
        scratch_bytes=scratch_bytes,
    )


def unfused_attention(*arguments: Any, **options: Any) -> Tensor:
    """compose_attention in plain PyTorch, each step rounded to the input's dtype: the baseline of the error rule."""
    return reference_attention(checked_call(*arguments, **options), upcast=False)


def random_inputs(
    batch: int = 2,
    queries: int = 9,
    keys: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    head_dim: int = 8,
    rank: int = 2,
    absent: Collection[str] = (),
    documents: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    **options: Any,
) -> AttentionInputs:
    """Normal random inputs in float64, rounded to bfloat16, with weights that change the result a lot.

    Args:
        batch: B.
        queries: T.
        keys: S; as many as queries by default.
        heads: H.
        kv_heads: G; as many as heads by default.
        head_dim: D.
        rank: R of the weights.
        absent: names of :data:`WEIGHTS` to leave out. The other tensors do not depend on it.
        documents: mean length of documents in tokens, with at least two in the first row; None for no document_ids.
        seed: of the random generator.
        device: where the tensors are created.
        **options: further arguments of compose_attention.
    """
    keys, kv_heads = keys or queries, kv_heads or heads
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(shape, generator=generator, dtype=torch.float64, device=device)).bfloat16().double()

    tensors = {
        "q": normal(batch, queries, heads, head_dim),
        "k": normal(batch, keys, kv_heads, head_dim),
        "v": normal(batch, keys, kv_heads, head_dim),
    }
    for name in WEIGHTS:
        side, kind = name[-2:]
        positions = queries if side == "q" else keys
        shape = (batch, positions, heads) if kind == "g" else (batch, positions, rank, heads)
        weight = normal(*shape, std={"1": 1.0, "2": 0.5 * heads**-0.5, "g": 0.5}[kind])
        if name not in absent:
            tensors[name] = weight
    if documents is not None:
        starts = torch.rand(batch, keys, generator=generator, device=device) < 1 / documents
        starts[0, keys - queries // 2 - 1] = True
        options["document_ids"] = starts.cumsum(1).int()
    return AttentionInputs(tensors, normal(batch, queries, heads, head_dim), options)


FORWARD_FACTOR = 2
GRADIENT_FACTOR = 3
"""Errors may be this many times those of unfused PyTorch, as in flash-attention's tests."""


def check_error(name: str, result: Tensor, plain: Tensor, truth: Tensor, factor: float) -> float:
    """Check that the error of ``result`` is at most ``factor`` times that of ``plain``, in the 2-norm.

    The norm of the largest element is unsuitable: in float32 the largest errors of two correct implementations differ
    by more than these factors by chance. For the same reason a tensor should have a few hundred independent elements,
    which a batch of eight provides even for the smallest shapes.

    Args:
        name: of the tensor, for the message.
        result: of the implementation.
        plain: of the same formula in plain PyTorch, in the same dtype.
        truth: of the same formula in a wider dtype. Rounding it to the result's dtype is unavoidable, so ``plain``
            counts as at least that far off.
        factor: see above.

    Returns:
        The error as a fraction of the allowed error.

    Raises:
        AssertionError: the error is larger, or the tensors cannot be compared.
    """
    if not result.dtype == plain.dtype != truth.dtype:
        raise AssertionError(f"{name}: {result.dtype} cannot be compared with {plain.dtype} and {truth.dtype}")
    if not result.shape == plain.shape == truth.shape:
        raise AssertionError(f"{name}: shapes {tuple(result.shape)}, {tuple(plain.shape)}, {tuple(truth.shape)} differ")
    error, plain_error, rounding = (
        torch.linalg.vector_norm(x.double() - truth.double()).item() for x in (result, plain, truth.to(result.dtype))
    )
    allowed = factor * max(plain_error, rounding)
    if not error <= allowed:  # also when it is NaN
        raise AssertionError(
            f"{name}: the error's norm is {error:.3e}, more than {factor} x {max(plain_error, rounding):.3e} "
            f"(plain PyTorch: {plain_error:.3e}, rounding alone: {rounding:.3e})"
        )
    return error / allowed if allowed else 0.0


def check_results(results: dict[str, Tensor], plain: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """:func:`check_error` of all tensors by name: the output "out", all others are gradients."""
    if not results.keys() == plain.keys() == truth.keys():
        raise AssertionError(f"different results: {list(results)}, {list(plain)}, {list(truth)}")
    factors = {name: FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR for name in truth}
    return {name: check_error(name, results[name], plain[name], truth[name], factors[name]) for name in truth}


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Check that all results are finite and within ``tolerance`` of the expected ones, relative to their 2-norm."""
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.isfinite(result).all(), name
        assert (result - expected[name]).norm() <= tolerance * expected[name].norm(), name
