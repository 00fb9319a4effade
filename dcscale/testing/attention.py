"""Inputs of compose attention, and what it makes of them: the output and the gradient of every tensor.

How large the error of an implementation may be: a multiple of what plain PyTorch makes of it in the same type.

The rule is that of flash-attention's tests, so that no tolerance has to be guessed for a shape or a type.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dcscale.ops import ComposeWeights, compose_attention
from dcscale.ops.compose.reference import reference_attention

WEIGHTS = [f"{stage}.{name}" for stage in ("pre", "post") for name in ComposeWeights._fields]
"""The twelve weights: pre.q1 ... post.kg."""

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
}
"""Arguments of :func:`random_inputs` for every way to call plain attention."""

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
}
"""Arguments of :func:`random_inputs` for the calls that an implementation of compose attention must get right."""


@dataclass
class AttentionInputs:
    """``tensors``: q, k, v and any of :data:`WEIGHTS`; ``cotangent``: the gradient of the output [B, T, H, D];
    ``options``: window, document_ids, query_offset, scale."""

    tensors: dict[str, Tensor]
    cotangent: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def to(self, dtype: torch.dtype, device: str | None = None) -> AttentionInputs:
        """The same in another type, and on another device."""
        tensors = {name: tensor.to(device, dtype) for name, tensor in self.tensors.items()}
        options = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in self.options.items()}
        return AttentionInputs(tensors, self.cotangent.to(device, dtype), options)

    def with_tensors(self, **tensors: Tensor) -> AttentionInputs:
        """The same with some tensors replaced."""
        return replace(self, tensors={**self.tensors, **tensors})

    def run(self, backend: str) -> dict[str, Tensor]:
        """Of :func:`compose_attention`: "out", and the gradient of every tensor under the tensor's name."""
        return self.run_function(
            lambda *arguments, **options: compose_attention(*arguments, **options, backend=backend)
        )

    def run_function(self, function: Callable[..., Tensor]) -> dict[str, Tensor]:
        """:meth:`run` of any function with compose_attention's arguments. Tensors without a part in it get zeros."""
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in self.tensors.items()}
        out = function(*arguments(leaves), **self.options)
        gradients = torch.autograd.grad(out, leaves.values(), self.cotangent, allow_unused=True, materialize_grads=True)
        return {"out": out.detach(), **dict(zip(leaves, gradients))}


def arguments(
    tensors: dict[str, Tensor],
) -> tuple[Tensor, Tensor, Tensor, ComposeWeights | None, ComposeWeights | None]:
    """q, k, v, pre, post from tensors by name."""
    stages = []
    for stage in ("pre", "post"):
        weights = {name: tensors.get(f"{stage}.{name}") for name in ComposeWeights._fields}
        stages.append(None if all(w is None for w in weights.values()) else ComposeWeights(**weights))
    return tensors["q"], tensors["k"], tensors["v"], *stages


def unfused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pre: ComposeWeights | None = None,
    post: ComposeWeights | None = None,
    *,
    window: int | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
) -> Tensor:
    """compose_attention in plain PyTorch, each step rounded to the input's type: the yardstick of the error rule."""
    return reference_attention(
        q,
        k,
        v,
        pre,
        post,
        window=window,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        document_ids_BS=document_ids,
        query_offset=k.shape[1] - q.shape[1] if query_offset is None else query_offset,
        upcast=False,
    )


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
    """Normal random inputs in float64 whose compose changes the result a lot, rounded to what bfloat16 can hold.

    absent: names of :data:`WEIGHTS` to leave out. documents: their mean length, with at least two in the first row.
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


def check_error(name: str, result: Tensor, plain: Tensor, truth: Tensor, factor: float) -> float:
    """Fail if ``result`` is further from ``truth`` than ``factor`` times what ``plain`` is.

    result: of the implementation. plain: of the same formula in plain PyTorch, in the same type. truth: in a wider
    type. Rounding the truth to the type of the result is an error that nothing can avoid, so ``plain`` counts as at
    least that far. Returns the error as a part of what is allowed.

    The distance is the 2-norm. The largest element would not do: in float32 the largest errors of two right
    implementations differ by more than these factors by chance. For the same reason a tensor should have a few
    hundred elements that do not hang on one another, which a batch of eight gives the smallest shapes.
    """
    if not result.dtype == plain.dtype != truth.dtype:
        raise AssertionError(f"{name}: {result.dtype} cannot be judged by {plain.dtype} and a truth in {truth.dtype}")
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
    """:func:`check_error` for an output "out" and for gradients, which is what all other names are."""
    if not results.keys() == plain.keys() == truth.keys():
        raise AssertionError(f"different results: {list(results)}, {list(plain)}, {list(truth)}")
    factors = {name: FORWARD_FACTOR if name == "out" else GRADIENT_FACTOR for name in truth}
    return {name: check_error(name, results[name], plain[name], truth[name], factors[name]) for name in truth}


def assert_same(results: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    """Fail unless all are finite and each is within ``tolerance`` of what is expected, relative to its 2-norm."""
    assert results.keys() == expected.keys()
    for name, result in results.items():
        assert torch.isfinite(result).all(), name
        assert (result - expected[name]).norm() <= tolerance * expected[name].norm(), name
