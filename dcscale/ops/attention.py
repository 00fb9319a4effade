"""Plain causal attention by flash-attn or scaled_dot_product_attention, and the argument checks of all attention.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcscale.ops import flash
from dcscale.ops.masks import key_range, visible_keys

FLOAT_DTYPES = ("torch.float64", "torch.float32", "torch.bfloat16", "torch.float16")

_QUERIES_PER_MASK = 512
"""Queries of one SDPA call with a mask: bounds the mask to 512 * S elements."""
_MIN_QUERIES_PER_WINDOWED_CALL = 128
"""Below this, the overhead of more SDPA calls costs more than the invisible keys they skip."""


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
    """``softmax(scale * q k^T, masked) v`` per head.

    Args:
        q: [B, T, H, D].
        k: [B, S, G, D], with G a divisor of H.
        v: as k.
        window: as in :func:`dcscale.ops.compose_attention`, as are the arguments below and the errors.
        scale: factor on the scores.
        document_ids: [B, S].
        query_offset: position of the first query.

    Returns:
        [B, T, H, D] in q's dtype, differentiable in q, k and v.

    Raises:
        ValueError: an argument does not fit.
    """
    scale, query_offset = check_attention(q, k, v, window, scale, document_ids, query_offset)
    queries = q.shape[1]
    if window is not None and window >= query_offset + queries:
        window = None  # it excludes nothing
    if flash.unavailable_reason(q) is None:
        out = flash.flash_attention(
            q, k, v, window=window, scale=scale, document_ids_BS=document_ids, query_offset=query_offset
        )
        if out is not None:
            return out
    if query_offset == 0 and window is None and document_ids is None:
        return _sdpa(q, k[:, :queries], v[:, :queries], scale, causal=True)

    # SDPA needs an explicit mask here. Call it for some queries at a time, with only the keys that these can see.
    step = _QUERIES_PER_MASK if window is None else max(_MIN_QUERIES_PER_WINDOWED_CALL, window // 2)
    outputs = []
    for start in range(query_offset, query_offset + queries, step):
        end = min(start + step, query_offset + queries)
        first, last = key_range(start, end - 1, window)
        seen = visible_keys(range(start, end), range(first, last), window, document_ids, q.device)
        q_chunk = q[:, start - query_offset : end - query_offset]
        outputs.append(_sdpa(q_chunk, k[:, first:last], v[:, first:last], scale, seen))
    return torch.cat(outputs, dim=1)


def _sdpa(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, scale: float, seen: Tensor | None = None, causal: bool = False
) -> Tensor:
    group = q_BTHD.shape[2] // k_BSGD.shape[2]
    # With fewer key/value heads only SDPA's flash kernel on CUDA is sure to be used; in all other cases enable_gqa may
    # select the unfused math backend, so repeat the heads instead.
    supports_gqa = q_BTHD.is_cuda and causal and q_BTHD.dtype in (torch.bfloat16, torch.float16)
    if group > 1 and not supports_gqa:
        k_BSGD, v_BSGD = (x.repeat_interleave(group, dim=2) for x in (k_BSGD, v_BSGD))
    out_BHTD = F.scaled_dot_product_attention(
        q_BTHD.transpose(1, 2),
        k_BSGD.transpose(1, 2),
        v_BSGD.transpose(1, 2),
        attn_mask=None if seen is None else seen.view(-1, 1, *seen.shape[-2:]),
        is_causal=causal,
        scale=scale,
        enable_gqa=group > 1 and supports_gqa,
    )
    return out_BHTD.transpose(1, 2)


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    scale: float | None,
    document_ids: Tensor | None,
    query_offset: int | None,
) -> tuple[float, int]:
    """Check the arguments that plain and compose attention share; return scale and query_offset with their defaults.

    Raises:
        ValueError: the first argument that does not fit, with its shape or value and what was expected.
    """
    if q.dim() != 4:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected four axes [B, T, H, D]")
    batch, queries, heads, head_dim = q.shape
    if str(q.dtype) not in FLOAT_DTYPES:
        raise ValueError(f"q is {q.dtype}, expected one of {', '.join(FLOAT_DTYPES)}")
    if 0 in q.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, expected no empty axis")
    if k.dim() != 4 or k.shape[0] != batch or k.shape[3] != head_dim or 0 in k.shape:
        raise ValueError(
            f"k has shape {tuple(k.shape)}, expected [B={batch}, S, kv heads, D={head_dim}] to match q {tuple(q.shape)}"
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
        raise ValueError(f"window is {window}, expected an integer >= 1 (a query sees itself), or None for no window")
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
    """Raise ValueError unless ``tensor`` has this shape, and q's dtype and device."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype != q.dtype:
        raise ValueError(f"{name} {tuple(tensor.shape)} is {tensor.dtype}, expected q's dtype, {q.dtype}")
    check_device(name, tensor, q)


def check_device(name: str, tensor: Tensor, q: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is on q's device."""
    if tensor.device != q.device:
        raise ValueError(f"{name} {tuple(tensor.shape)} is on {tensor.device}, expected q's device, {q.device}")
