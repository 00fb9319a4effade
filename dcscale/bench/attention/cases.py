"""The shapes that are measured, and what a shape costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from dcscale.bench.attention.implementations import COMPILED, DENSE
from dcscale.ops.visibility import visible_pairs
from dcscale.testing.attention import AttentionInputs, random_inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = ("forward", "forward_backward")
Row = dict[str, Any]
"""JSON of one implementation in one case."""
BACKWARD_FLOPS = 2.5
"""Of backward, in those of forward: five products of the size T x S x D instead of two."""

CENTRE = {"cuda": (4096, 32, 128), "cpu": (4096, 16, 64)}
"""Length, heads and head width that the targets are for."""
_LENGTHS = {"cuda": (1024, 2048, 4096, 8192, 16384, 32768), "cpu": (1024, 4096)}
_HEAD_SHAPES = {"cuda": tuple(product((32, 16), (128, 64, 80)))[1:], "cpu": ()}
_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}
_LONGEST_DENSE_ON_CPU = 1024
_LENGTH_OF_CHECKS, _LARGEST_WINDOW_OF_CHECKS = 321, 256


@dataclass(frozen=True)
class Case:
    """One call of attention; a window of None is none."""

    dtype: str
    batch: int
    length: int
    heads: int
    head_dim: int
    window: int | None
    rank: int

    def __str__(self) -> str:
        window = "no window" if self.window is None else f"window {self.window}"
        return f"{self.dtype}, B={self.batch}, T={self.length}, H={self.heads}, D={self.head_dim}, {window}"

    def forward_flops(self, windowed: bool) -> int:
        """Of the two matrix products, for the pairs of query and key that are visible: 4 D a pair and head.

        This is how flash-attention counts. Mixing heads, softmax and what is computed again count nothing.
        """
        pairs = visible_pairs(self.length, self.window if windowed else None)
        return 4 * self.batch * self.heads * self.head_dim * pairs

    def for_checks(self) -> Case:
        """The short case whose errors stand for this one's, as odd as they come, with a window that still bites."""
        window = None if self.window is None else min(self.window, _LARGEST_WINDOW_OF_CHECKS)
        return replace(self, batch=1, length=_LENGTH_OF_CHECKS, window=window)

    def draw(self, device: str) -> AttentionInputs:
        """Random inputs in float64, which the case's type holds exactly."""
        return random_inputs(
            self.batch,
            self.length,
            heads=self.heads,
            head_dim=self.head_dim,
            rank=self.rank,
            device=device,
            **({} if self.window is None else {"window": self.window}),
        )


def make_cases(
    device: str,
    *,
    dtypes: Sequence[str] | None = None,
    batch: int = 1,
    lengths: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    head_dims: Sequence[int] | None = None,
    windows: Sequence[int | None] | None = None,
    rank: int = 2,
    quick: bool = False,
) -> list[Case]:
    """All combinations of what is given. Where no shape is, all lengths at the centre, and all heads at its length."""
    length, *head_shape = CENTRE[device]
    if lengths or heads or head_dims:
        shapes = list(product(lengths or [length], heads or head_shape[:1], head_dims or head_shape[1:]))
    elif quick and device == "cuda":
        shapes = [CENTRE[device]]
    else:
        shapes = [(each, *head_shape) for each in _LENGTHS[device]]
        shapes += [(length, *other) for other in _HEAD_SHAPES[device]]
    combinations = product(shapes, windows or (None, 256), dtypes or _DTYPES[device])
    cases = [Case(dtype, batch, *shape, window, rank) for shape, window, dtype in combinations]
    return list(dict.fromkeys(cases))  # what was given twice is measured once


def too_slow(kind: str, case: Case, first: Case, device: str, quick: bool) -> str | None:
    """Why an implementation is not run in this case unless it is asked for by name; None where it is."""
    ask = f"(ask for it with --kinds {kind})"
    if kind in DENSE and device == "cpu" and case.length > _LONGEST_DENSE_ON_CPU:
        return f"too slow on a CPU above T={_LONGEST_DENSE_ON_CPU} {ask}"
    if kind in DENSE and device == "cpu" and quick and case != first:
        return f"too slow for --quick in more than the first case {ask}"
    if kind in COMPILED and (case.heads, case.head_dim) != (first.heads, first.head_dim):
        return f"compiling takes long, so only with H={first.heads}, D={first.head_dim} {ask}"
    if kind == "compiled" and (quick or (device == "cuda" and case.length != CENTRE[device][0])):
        return f"compiling takes long {ask}"
    return None
