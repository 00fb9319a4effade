"""Plain causal attention, and the checks of arguments that it shares with composed attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcscale.ops import flash
from dcscale.ops.masks import key_range, visible_keys

FLOAT_TYPES = ("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    document_ids: Tensor | None,
    query_offset: int | None,
) -> tuple[float, int]:
    """Raise ValueError at the first argument that does not fit; return scale and query_offset with their defaults."""
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected four axes [B, T, H, D]")
    batch, queries, heads, head_dim = q.shape
    if str(q.dtype) not in FLOAT_TYPES:
        raise ValueError(f"q is {q.dtype}, expected one of {', '.join(FLOAT_TYPES)}")
    if 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected no empty axis")
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim or 0 in k.shape:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, expected [B={batch}, S, kv heads, D={head_dim}] to fit q {tuple(q.shape)}"
        )
    keys, kv_heads = k.shape[1:3]
    if heads % kv_heads:
        raise ValueError(f"k has {kv_heads} heads (shape {tuple(k.shape)}), expected a divisor of q's {heads} heads")
    check_tensor("k", k, k.shape, q)
    check_tensor("v", v, k.shape, q)
    if queries > keys:
        raise ValueError(f"q has {queries} queries for {keys} keys: every query must have its own key, so T <= S")
    if query_offset is None:
        query_offset = keys - queries
    if not 0 <= query_offset <= keys - queries:
        raise ValueError(
            f"query_offset is {query_offset}, expected 0 <= query_offset <= S - T = {keys - queries}: "
            f"every query must have its own key"
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window is {window}, expected a whole number from 1 (a query sees itself), or None for none")
    if document_ids is not None:
        if tuple(document_ids.shape) != (batch, keys):
            raise ValueError(
                f"document_ids has shape {tuple(document_ids.shape)}, expected [B={batch}, S={keys}], one for each key"
            )
        if document_ids.is_floating_point() or document_ids.is_complex():
            raise ValueError(f"document_ids is {document_ids.dtype}, expected integers")
        check_device("document_ids", document_ids, q)
    return (head_dim**-0.5 if scale is None else scale), query_offset


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...], q: Tensor) -> None:
    """``tensor`` must have this shape, and q's type and device."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name} {tuple(tensor.shape)} is {tensor.dtype}, expected q's type, {q.dtype}")
    check_device(name, tensor, q)


def check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    """``tensor`` must be where q is."""
    if tensor.device != q.device:
        raise ValueError(f"{name} {tuple(tensor.shape)} is on {tensor.device}, expected q's device, {q.device}")


_MASKED_QUERIES = 512
"""Queries that share one mask: bounds its size to 512 * S."""
_WINDOWED_QUERIES = 128
"""Fewest queries a call with a window: below, the calls themselves cost more than the keys they save."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    document_ids: Tensor | None = None,
    query_offset: int | None = None,
) -> Tensor:
    """``softmax(scale * q k^T, masked) v`` by head; arguments and errors as :func:`dcscale.ops.compose_attention`.

    q: [B, T, H, D]; k, v: [B, S, G, D]. Returns [B, T, H, D] in q's type, differentiable in q, k and v.
    """
    scale, query_offset = check_attention(q, k, v, window, scale, document_ids, query_offset)
    queries = q.shape[1]
    if window is not None and window >= query_offset + queries:
        window = None
    if flash.unavailable_reason(q) is None:
        out = flash.flash_attention(
            q, k, v, window=window, scale=scale, document_ids_BS=document_ids, query_offset=query_offset
        )
        if out is not None:
            return out
    if query_offset == 0 and window is None and document_ids is None:
        return _sdpa(q, k[:, :queries], v[:, :queries], scale, causal=True)

    step = _MASKED_QUERIES if window is None else max(_WINDOWED_QUERIES, window // 2)
    parts = []
    for start in range(query_offset, query_offset + queries, step):
        end = min(start + step, query_offset + queries)
        first, last = key_range(start, end - 1, window)
        seen = visible_keys(range(start, end), range(first, last), window, document_ids, q.device)
        q_part = q[:, start - query_offset : end - query_offset]
        parts.append(_sdpa(q_part, k[:, first:last], v[:, first:last], scale, seen))
    return torch.cat(parts, dim=1)


def _sdpa(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, scale: float, seen: Tensor | None = None, causal: bool = False
) -> Tensor:
    group = q_BTHD.shape[2] // k_BSGD.shape[2]
    # Of the fused kernels, only flash on CUDA is sure to take fewer key/value heads; the others would give way to the
    # dense formula.
    takes_groups = q_BTHD.is_cuda and causal and q_BTHD.dtype in (torch.bfloat16, torch.float16)
    if group > 1 and not takes_groups:
        k_BSGD, v_BSGD = (x.repeat_interleave(group, dim=2) for x in (k_BSGD, v_BSGD))
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGD.transpose(1, 2),
        attn_mask=None if seen is None else seen.view(-1, 1, *seen.shape[-2:]),
        is_causal=causal,
        scale=scale,
        enable_gqa=group > 1 and takes_groups,
    )
    return out_BHTD.transpose(1, 2)
