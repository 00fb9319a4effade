"""What is compared: shapes, and implementations of compose and plain attention."""

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

from dcscale.ops import attention, choose_backend, compose_attention, flash
from dcscale.ops.compose.api import BACKENDS
from dcscale.ops.masks import visible_pairs
from dcscale.testing.attention import AttentionInputs, arguments, random_inputs, unfused_attention

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


FUSED_BACKENDS = tuple(name for name in BACKENDS if name not in ("auto", "reference"))
KINDS = {
    "dense": "compose attention, the dense formula in plain PyTorch, every step in the input's type",
    "dense-compiled": "the same through torch.compile",
    **{name: f"compose attention, backend {name!r}" for name in FUSED_BACKENDS},
    "sdpa": "plain attention over all keys before a query, by every fused backend of scaled_dot_product_attention",
    "flash-attn": "the same by the flash-attn package, with the deterministic backward pass that dcscale uses",
    "windowed": "plain attention with the case's window: dcscale.ops.attention",
}
DENSE = ("dense", "dense-compiled")
COMPILED = ("dense-compiled", "compiled")
YARDSTICKS = ("dense-compiled", "sdpa", "flash-attn")
"""Made by others: where they cannot run they are left out, while a failure of ours is a failure."""

_SDPA_BACKENDS = {
    "cuda": (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION),
    "cpu": (SDPBackend.FLASH_ATTENTION,),
}


@dataclass(frozen=True)
class Implementation:
    """``function`` takes q, k, v, pre, post and, if ``windowed``, a window; plain attention gets None for pre, post."""

    name: str
    kind: str
    function: Callable[..., Tensor]
    composed: bool = True
    windowed: bool = True
    note: str = ""

    def inputs(self, inputs: AttentionInputs) -> AttentionInputs:
        """What of ``inputs`` this takes."""
        tensors = inputs.tensors if self.composed else {name: inputs.tensors[name] for name in ("q", "k", "v")}
        return replace(inputs, tensors=tensors, options=inputs.options if self.windowed else {})


def implementations(
    kinds: Collection[str], example: AttentionInputs, device: str
) -> tuple[list[Implementation], dict[str, str]]:
    """Those of ``kinds`` that can be tried on inputs like ``example``, and why others cannot, by name."""
    q, k, v, pre, post = arguments(example.tensors)
    found, missing = [], {}
    if "dense" in kinds:
        found.append(Implementation("dense", "dense", unfused_attention))
    if "dense-compiled" in kinds:
        compiled = torch.compile(unfused_attention, dynamic=False, fullgraph=True)
        found.append(Implementation("dense-compiled", "dense-compiled", compiled))
    for name in FUSED_BACKENDS:
        if name not in kinds:
            continue
        try:
            choose_backend(name, q, pre, post)
        except ValueError as error:
            missing[name] = str(error)
            continue
        if name == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            missing[name] = "TRITON_INTERPRET=1 is set, and the interpreter's speed means nothing"
            continue
        found.append(Implementation(name, name, partial(compose_attention, backend=name)))
    if "sdpa" in kinds:
        chosen = torch._fused_sdp_choice(*(x.transpose(1, 2).requires_grad_() for x in (q, k, v)), is_causal=True)
        for backend in _SDPA_BACKENDS[device]:
            name = f"sdpa {backend.name.partition('_')[0].lower()}"
            note = "torch's own choice" if backend.value == chosen else ""
            found.append(Implementation(name, "sdpa", partial(_sdpa, backend), False, False, note))
    problem = flash.unavailable_reason(q)
    if "flash-attn" in kinds and problem is None:
        found.append(Implementation("flash-attn", "flash-attn", _flash_attn, False, False))
    elif "flash-attn" in kinds:
        missing["flash-attn"] = problem
    if "windowed" in kinds and "window" in example.options:
        through = "scaled_dot_product_attention" if problem else "flash-attn"
        found.append(Implementation("windowed", "windowed", _windowed, False, note=f"through {through}"))
    return found, missing


def _sdpa(backend: SDPBackend, q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: None) -> Tensor:
    with sdpa_kernel(backend):
        out_BHTD = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q_BTHD, k_BTHD, v_BTHD)), is_causal=True
        )
    return out_BHTD.transpose(1, 2)


def _flash_attn(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: None) -> Tensor:
    scale = q_BTHD.shape[3] ** -0.5
    return flash.flash_attention(q_BTHD, k_BTHD, v_BTHD, window=None, scale=scale, document_ids_BS=None, query_offset=0)


def _windowed(q_BTHD: Tensor, k_BTHD: Tensor, v_BTHD: Tensor, *_: None, window: int) -> Tensor:
    return attention(q_BTHD, k_BTHD, v_BTHD, window=window)
