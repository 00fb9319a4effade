"""What the benchmark compares: cases (shapes and dtypes), and implementations of compose and plain attention."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcscale.bench.attention import DTYPE_NAMES, FUSED_BACKENDS, PLAIN
from dcscale.ops import attention, choose_backend, compose_attention, flash
from dcscale.ops.attention import plain_backend, sdpa_backend
from dcscale.ops.masks import visible_pairs
from dcscale.testing.attention import AttentionInputs, arguments, random_inputs, unfused_attention

DTYPES = dict(zip(DTYPE_NAMES, (torch.float32, torch.bfloat16, torch.float16)))
PASSES = ("forward", "forward_backward")
Row = dict[str, Any]
"""JSON object with the results of one implementation in one case."""
BACKWARD_FLOPS = 2.5
"""FLOPs of backward relative to forward: five products of size T x S x D instead of two."""

TARGET_SHAPE = {"cuda": (4096, 32, 128), "cpu": (4096, 16, 64)}
"""Length, heads and head dim that the targets are stated for."""
_LENGTHS = {"cuda": (1024, 2048, 4096, 8192, 16384, 32768), "cpu": (1024, 4096)}
_HEAD_SHAPES = {"cuda": tuple(product((32, 16), (128, 64, 80)))[1:], "cpu": ()}
_DTYPES = {"cuda": ("bf16",), "cpu": ("fp32", "bf16")}
_MAX_DENSE_LENGTH_ON_CPU = 1024
_CHECK_LENGTH, _MAX_CHECK_WINDOW = 321, 256


@dataclass(frozen=True)
class Case:
    """One call of attention, with as many keys as queries; a window of None means no window."""

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
        """FLOPs of the two matrix products over visible (query, key) pairs: 4 D per pair and head.

        This is flash-attention's convention: compose, softmax and recomputation are not counted.
        """
        pairs = visible_pairs(self.length, self.window if windowed else None)
        return 4 * self.batch * self.heads * self.head_dim * pairs

    def for_checks(self) -> Case:
        """The short case, of an odd length and beyond its window, whose errors are checked instead of this one's."""
        window = None if self.window is None else min(self.window, _MAX_CHECK_WINDOW)
        return replace(self, batch=1, length=_CHECK_LENGTH, window=window)

    def draw(self, device: str) -> AttentionInputs:
        """Random inputs in float64, with values that the case's dtype holds exactly."""
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
    """All combinations of the given values.

    Without lengths, heads and head dims: all default lengths with the heads of :data:`TARGET_SHAPE`, and all default
    heads and head dims at its length.
    """
    length, *head_shape = TARGET_SHAPE[device]
    if lengths or heads or head_dims:
        shapes = list(product(lengths or [length], heads or head_shape[:1], head_dims or head_shape[1:]))
    elif quick and device == "cuda":
        shapes = [TARGET_SHAPE[device]]
    else:
        shapes = [(each, *head_shape) for each in _LENGTHS[device]]
        shapes += [(length, *other) for other in _HEAD_SHAPES[device]]
    # Dtypes vary fastest, so that cases with the same shape and window are neighbours.
    combinations = product(shapes, windows or (None, 256), dtypes or _DTYPES[device])
    cases = [Case(dtype, batch, *shape, window, rank) for shape, window, dtype in combinations]
    return list(dict.fromkeys(cases))  # values that are given twice are measured once


def too_slow(kind: str, case: Case, first: Case, device: str, quick: bool) -> str | None:
    """Why an implementation is skipped in this case unless --kinds requests it; None if it runs."""
    hint = f"(request it with --kinds {kind})"
    if kind in DENSE and device == "cpu" and case.length > _MAX_DENSE_LENGTH_ON_CPU:
        return f"too slow on a CPU above T={_MAX_DENSE_LENGTH_ON_CPU} {hint}"
    if kind in DENSE and device == "cpu" and quick and case != first:
        return f"too slow for --quick in more than the first case {hint}"
    if kind in COMPILED and (case.heads, case.head_dim) != (first.heads, first.head_dim):
        return f"compilation is slow, so only with H={first.heads}, D={first.head_dim} {hint}"
    if kind == "compiled" and (quick or (device == "cuda" and case.length != TARGET_SHAPE[device][0])):
        return f"compilation is slow {hint}"
    return None


DENSE = ("dense", "dense-compiled")
COMPILED = ("dense-compiled", "compiled")
BASELINES = ("dense-compiled", *PLAIN)
"""Kinds that rely on other projects' kernels and compilers. If they fail they are skipped; if dcscale's own fail, the
benchmark fails."""

_SDPA_BACKENDS = {
    "cuda": {
        "cudnn": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    },
    "cpu": {"flash": SDPBackend.FLASH_ATTENTION},
}


@dataclass(frozen=True)
class Implementation:
    """An implementation of attention.

    ``function`` takes q, k, v, pre, post and, if ``windowed``, a window. Plain attention (not ``composed``) gets None
    for pre and post.
    """

    name: str
    kind: str
    function: Callable[..., Tensor]
    composed: bool = True
    windowed: bool = True
    note: str = ""

    def inputs(self, inputs: AttentionInputs) -> AttentionInputs:
        """The part of ``inputs`` that the implementation takes."""
        tensors = inputs.tensors if self.composed else {name: inputs.tensors[name] for name in ("q", "k", "v")}
        return replace(inputs, tensors=tensors, options=inputs.options if self.windowed else {})


def implementations(
    kinds: Collection[str], example: AttentionInputs, device: str
) -> tuple[list[Implementation], dict[str, str]]:
    """(the implementations of ``kinds`` that can run on inputs like ``example``, why others cannot, by name)."""
    q, _, _, pre, post = arguments(example.tensors)
    found, missing = [], {}
    if "dense" in kinds:
        found.append(Implementation("dense", "dense", unfused_attention))
    if "dense-compiled" in kinds:
        compiled = torch.compile(unfused_attention, dynamic=False, fullgraph=True)
        found.append(Implementation("dense-compiled", "dense-compiled", compiled))
    for name in FUSED_BACKENDS:
        if name not in kinds:
            continue
        # compose_attention would raise the same error at the first call.
        try:
            choose_backend(name, q, pre, post)
        except ValueError as error:
            missing[name] = str(error)
            continue
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            missing[name] = "TRITON_INTERPRET=1 is set, and the interpreter's speed is meaningless"
            continue
        found.append(Implementation(name, name, partial(compose_attention, backend=name)))
    if "sdpa" in kinds:
        chosen = sdpa_backend(q)
        for name, backend in _SDPA_BACKENDS[device].items():
            note = "torch's default" if name == chosen else ""
            found.append(Implementation(f"sdpa {name}", "sdpa", partial(_sdpa, backend), False, False, note))
    used, _ = plain_backend(q)
    for package in (each for each in flash.PACKAGES if each in kinds):
        problem = flash.unavailable_reason(q, package)
        if problem is not None:
            missing[package] = problem
            continue
        for deterministic in (False, True):
            name = f"{package} deterministic" if deterministic else package
            note = "what dcscale uses" if deterministic and package == used else ""
            function = partial(_flash, package, deterministic)
            found.append(Implementation(name, package, function, False, False, note))
    if "windowed" in kinds and "window" in example.options:
        through = used if used in flash.PACKAGES else "scaled_dot_product_attention with masks"
        found.append(Implementation("windowed", "windowed", _windowed, False, note=f"through {through}"))
    return found, missing


def _sdpa(backend: SDPBackend, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: None) -> Tensor:
    with sdpa_kernel(backend):
        out_BHTD = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD)), is_causal=True
        )
    return out_BHTD.transpose(1, 2)


def _flash(package: str, deterministic: bool, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: None) -> Tensor:
    options = {"causal": True, "window": None, "document_ids_BS": None, "query_offset": 0}
    options |= {"scale": q_BTHD.shape[3] ** -0.5, "package": package, "deterministic": deterministic}
    return flash.flash_attention(q_BTHD, k_BTHD, v_BTHD, **options)


def _windowed(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: None, window: int) -> Tensor:
    return attention(q_BTHD, k_BTHD, v_BTHD, window=window)
