"""Plain attention by flash-attn or scaled_dot_product_attention, and the argument checks of all attention.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, current_flash_attention_impl

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
    causal: bool = True,
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
        causal: as in :func:`dcscale.ops.compose_attention`, as are the arguments below and the errors.
        window: keys that a query sees.
        scale: factor on the scores.
        document_ids: [B, S].
        query_offset: position of the first query.

    Returns:
        [B, T, H, D] in q's dtype, differentiable in q, k and v.

    Raises:
        ValueError: an argument does not fit.
    """
    scale, query_offset = check_attention(q, k, v, causal, window, scale, document_ids, query_offset)
    return checked_attention(
        q, k, v, causal=causal, window=window, scale=scale, document_ids=document_ids, query_offset=query_offset
    )


def plain_backend(q: Tensor) -> tuple[str, str]:
    """Name what :func:`attention` runs for q, where it needs no mask: the fastest that is present.

    Returns:
        (name, reason): "flash-attn-3" or "flash-attn" (see :mod:`dcscale.ops.flash`), or "sdpa" with the backend that
        PyTorch selects, such as "sdpa cudnn"; and why it is not a faster one.
    """
    problems: dict[str, list[str]] = {}
    for package in flash.PACKAGES_OF_RUNS:
        problem = flash.unavailable_reason(q, package)
        if problem is None:
            name, reasons = package, ["the fastest of those here whose gradients are the same bits in every run"]
            break
        problems.setdefault(problem, []).append(package)
    else:
        name, reasons = f"sdpa {sdpa_backend(q)}", []
    reasons += [f"not {' or '.join(packages)}: {problem}" for problem, packages in problems.items()]
    return name, "; ".join(reasons)


def sdpa_backend(q: Tensor) -> str:
    """The backend that scaled_dot_product_attention selects for causal training calls like q.

    "cudnn" (on Hopper and Blackwell, from cuDNN 9.15.1 on), "flash" ("fa3" or "fa4" where
    torch.nn.attention.activate_flash_attention_impl has replaced it), "efficient" or "math".
    """
    # torch has no public function for it. One position is not enough: cuDNN does not support it.
    like = torch.zeros(1, q.shape[2], 128, q.shape[3], dtype=q.dtype, device=q.device, requires_grad=True)
    chosen = torch._fused_sdp_choice(like, like, like, is_causal=True)
    name = SDPBackend(chosen).name.partition("_")[0].lower()
    activated = current_flash_attention_impl() if name == "flash" else None
    return name if activated is None else activated.lower()


def checked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    scale: float,
    document_ids: Tensor | None,
    query_offset: int,
) -> Tensor:
    """:func:`attention` with arguments that :func:`check_attention` has checked and completed."""
    queries, keys = q.shape[1], k.shape[1]
    if window is not None and window >= (query_offset + queries if causal else keys):
        window = None  # it excludes nothing
    package = flash.best_package(q)
    if package is not None:
        options = {"causal": causal, "window": window, "scale": scale, "query_offset": query_offset}
        out = flash.flash_attention(q, k, v, document_ids_BS=document_ids, package=package, **options)
        if out is not None:
            return out
    if window is None and document_ids is None:
        if not causal:
            return _sdpa(q, k, v, scale)
        if query_offset == 0:
            return _sdpa(q, k[:, :queries], v[:, :queries], scale, causal=True)

    # SDPA needs an explicit mask here. Call it for some queries at a time, with only the keys that these can see.
    step = _QUERIES_PER_MASK if window is None else max(_MIN_QUERIES_PER_WINDOWED_CALL, window // 2)
    outputs = []
    for start in range(query_offset, query_offset + queries, step):
        end = min(start + step, query_offset + queries)
        first, last = key_range(start, end - 1, window, causal, keys)
        seen = visible_keys(range(start, end), range(first, last), window, causal, document_ids, q.device)
        q_chunk = q[:, start - query_offset : end - query_offset]
        outputs.append(_sdpa(q_chunk, k[:, first:last], v[:, first:last], scale, seen))
    return torch.cat(outputs, dim=1)


def _sdpa(
    q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, scale: float, seen: Tensor | None = None, causal: bool = False
) -> Tensor:
    group = q_BTHD.shape[2] // k_BSGD.shape[2]
    # With fewer key/value heads only SDPA's flash kernel on CUDA is sure to be used; in all other cases enable_gqa may
    # select the unfused math backend, so repeat the heads instead.
    supports_gqa = q_BTHD.is_cuda and seen is None and q_BTHD.dtype in (torch.bfloat16, torch.float16)
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
    causal: bool,
    window: int | None,
    scale: float | None,
    document_ids: Tensor | None,
    query_offset: int | None,
) -> tuple[float, int]:
    """Check the arguments that plain and compose attention share; return scale and query_offset with their defaults.

    query_offset is 0 where the two sequences are unrelated.

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
    if causal and queries > keys:
        raise ValueError(
            f"q has {queries} queries for {keys} keys: every query must have its own key, so T <= S; "
            f"for cross attention, where the two sequences are unrelated, pass causal=False"
        )
    unrelated = not causal and query_offset is None and queries != keys
    if unrelated:
        for name, given in (("window", window), ("document_ids", document_ids)):
            if given is not None:
                raise ValueError(
                    f"{name} is given for {queries} queries and {keys} keys of unrelated sequences: "
                    f"pass query_offset if the queries are positions of the key sequence"
                )
        query_offset = 0
    elif query_offset is None:
        query_offset = keys - queries
    elif not 0 <= query_offset <= keys - queries:
        raise ValueError(
            f"query_offset is {query_offset}, expected 0 <= query_offset <= S - T = {keys - queries}: "
            f"every query must have its own key"
        )
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window is {window}, expected an integer >= 1 (a query sees itself), or None for no window")
    if scale is not None and (type(scale) is bool or not isinstance(scale, (int, float)) or not math.isfinite(scale)):
        raise ValueError(f"scale is {scale!r}, expected a finite number, or None for 1/sqrt(D)")
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
