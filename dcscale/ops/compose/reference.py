"""Compose attention as it is defined (DCMHA, arXiv 2405.08553): dense, any float type, in the order of the formulas.

Every other backend is tested against this one. Memory and time grow with H * T * S.

Axes in names: B batch, T queries, S keys, R rank, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import visible_keys


def reference_attention(
    q_BTHD: Tensor,
    k_BSGD: Tensor,
    v_BSGD: Tensor,
    pre: ComposeWeights | None,
    post: ComposeWeights | None,
    *,
    window: int | None,
    scale: float,
    document_ids_BS: Tensor | None,
    query_offset: int,
    upcast: bool = True,
) -> Tensor:
    """Arguments as :func:`dcscale.ops.compose_attention`, already checked -> [B, T, H, D] in q's type.

    ``upcast`` computes 16-bit input in float32. Without it every product is rounded to the input's type: what plain
    PyTorch would do, and the yardstick for the error of the other backends.
    """
    out_type = q_BTHD.dtype
    work_type = torch.promote_types(out_type, torch.float32) if upcast else out_type
    queries, keys = q_BTHD.shape[1], k_BSGD.shape[1]
    group = q_BTHD.shape[2] // k_BSGD.shape[2]
    q, k, v = (x.to(work_type) for x in (q_BTHD, k_BSGD, v_BSGD))
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))

    scores_BHTS = compose(torch.einsum("bthd,bshd->bhts", q, k) * scale, pre)
    positions = range(query_offset, query_offset + queries)
    seen = visible_keys(positions, range(keys), window, document_ids_BS, q.device)
    if seen is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen.unsqueeze(-3), -torch.inf)
    probabilities_BHTS = compose(scores_BHTS.softmax(dim=-1), post)
    return torch.einsum("bhts,bshd->bthd", probabilities_BHTS, v).to(out_type)


def compose(maps_BHTS: Tensor, weights: ComposeWeights | None) -> Tensor:
    """The heads' maps mixed by ``weights``, as :class:`ComposeWeights` states -> [B, H, T, S], in the maps' type."""
    if weights is None:
        return maps_BHTS
    w = {name: tensor.to(maps_BHTS.dtype) for name, tensor in weights.tensors().items()}
    out_BHTS = maps_BHTS
    if "qg" in w:
        out_BHTS = out_BHTS + torch.einsum("bhts,bth->bhts", maps_BHTS, w["qg"])
    if "kg" in w:
        out_BHTS = out_BHTS + torch.einsum("bhts,bsh->bhts", maps_BHTS, w["kg"])
    if "q1" in w and "q2" in w:
        latent_BRTS = torch.einsum("bgts,btrg->brts", maps_BHTS, w["q1"])
        out_BHTS = out_BHTS + torch.einsum("brts,btrh->bhts", latent_BRTS, w["q2"])
    if "k1" in w and "k2" in w:
        latent_BRTS = torch.einsum("bgts,bsrg->brts", maps_BHTS, w["k1"])
        out_BHTS = out_BHTS + torch.einsum("brts,bsrh->bhts", latent_BRTS, w["k2"])
    return out_BHTS
