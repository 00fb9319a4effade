"""How large the error of an implementation may be: a multiple of what plain PyTorch makes of it in the same type.

The rule is that of flash-attention's tests, so that no tolerance has to be guessed for a shape or a type.
"""

from __future__ import annotations

import torch
from torch import Tensor

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
