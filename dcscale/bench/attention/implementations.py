"""What is compared: compose attention in all forms, and plain attention as the fastest that PyTorch has."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dcscale.ops import attention, choose_backend, compose_attention, flash
from dcscale.ops.compose.api import BACKENDS
from dcscale.testing.attention import AttentionInputs, arguments, unfused_attention

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
    problem = flash.obstacle(q)
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
