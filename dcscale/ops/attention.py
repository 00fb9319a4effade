"""Plain causal attention: through flash-attn where it can run, else through ``scaled_dot_product_attention``.

Either way a window of W costs T * W.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dcscale.ops import flash
from dcscale.ops.arguments import check_attention
from dcscale.ops.visibility import key_range, visible_keys

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
    if flash.obstacle(q) is None:
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
