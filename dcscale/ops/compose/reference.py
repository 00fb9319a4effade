"""Compose attention as it is defined (DCMHA, arXiv 2405.08553): dense, any float dtype, in the order of the formulas.

Every other backend is tested against this one. Memory and time grow with H * T * S.

Axes in names: B batch, T queries, S keys, R rank, H query heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import visible_keys


def reference_attention(call: Call, upcast: bool = True) -> Tensor:
    """Compose attention of a checked call -> [B, T, H, D] in q's dtype.

    Args:
        call: the arguments; scratch_bytes is not used.
        upcast: compute 16-bit input in float32. Otherwise every product is rounded to the input's dtype, as plain
            PyTorch does; the error of the other backends is compared with that.
    """
    out_dtype = call.q.dtype
    compute_dtype = torch.promote_types(out_dtype, torch.float32) if upcast else out_dtype
    queries, keys = call.q.shape[1], call.k.shape[1]
    group = call.q.shape[2] // call.k.shape[2]
    q, k, v = (x.to(compute_dtype) for x in (call.q, call.k, call.v))
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))

    # S' = compose_pre(scale q k^T), masked
    scores_BHTS = compose(torch.einsum("bthd,bshd->bhts", q, k) * call.scale, call.pre)
    positions = range(call.query_offset, call.query_offset + queries)
    seen = visible_keys(positions, range(keys), call.window, call.causal, call.document_ids, q.device)
    if seen is not None:
        scores_BHTS = scores_BHTS.masked_fill(~seen.unsqueeze(-3), -torch.inf)
    # P' = compose_post(softmax(S'))
    probabilities_BHTS = compose(scores_BHTS.softmax(dim=-1), call.post)
    return torch.einsum("bhts,bshd->bthd", probabilities_BHTS, v).to(out_dtype)


def compose(x_BHTS: Tensor, weights: ComposeWeights) -> Tensor:
    """The formula of :class:`ComposeWeights` on scores or probabilities -> [B, H, T, S], in x's dtype."""
    w = {name: tensor.to(x_BHTS.dtype) for name, tensor in weights.tensors().items()}
    out_BHTS = x_BHTS
    # x * (1 + qg + kg)
    if "qg" in w:
        out_BHTS = out_BHTS + torch.einsum("bhts,bth->bhts", x_BHTS, w["qg"])
    if "kg" in w:
        out_BHTS = out_BHTS + torch.einsum("bhts,bsh->bhts", x_BHTS, w["kg"])
    # sum_r q2_r (sum_g q1_rg x_g), and the same by key
    if "q1" in w and "q2" in w:
        latent_BRTS = torch.einsum("bgts,btrg->brts", x_BHTS, w["q1"])
        out_BHTS = out_BHTS + torch.einsum("brts,btrh->bhts", latent_BRTS, w["q2"])
    if "k1" in w and "k2" in w:
        latent_BRTS = torch.einsum("bgts,bsrg->brts", x_BHTS, w["k1"])
        out_BHTS = out_BHTS + torch.einsum("brts,bsrh->bhts", latent_BRTS, w["k2"])
    return out_BHTS
