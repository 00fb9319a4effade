"""Checks of the arguments that plain and composed attention share."""

from __future__ import annotations

from torch import Tensor

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
