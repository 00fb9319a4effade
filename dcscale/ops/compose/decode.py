"""Compose attention for a few queries without gradients, as in decoding: no chunks, no operator, few PyTorch calls.

One query at a time, with exactly the keys that it can see. Nothing is copied where the tensors have the memory order of
the decoding cache: k and v [B, G, S, D], weights by key [B, R, H, S]. Other orders are correct, but slower.

Axes in names: B batch, T queries, S keys, R rank, H query heads, G key/value heads, D head width. The work is done in
float32 (float64 for float64 input).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import Call
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import key_range

MAX_QUERIES = 4
"""With more, the backends that work in chunks are faster."""


def suits_decode(call: Call) -> bool:
    """Whether :func:`decode_attention` is the right one: few queries, no gradients, and scratch memory for a query."""
    batch, queries, heads, _ = call.q.shape
    if queries > MAX_QUERIES:
        return False
    device = call.q.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return False  # the products would be in 16 bits
    tensors = call.differentiable()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        return False
    # Scores, probabilities, the composed ones, and for each rank two products by key, in 4 or 8 bytes.
    rank = max([0, *(x.shape[2] for x in (call.pre.k1, call.post.k1) if x is not None)])
    return batch * heads * call.k.shape[1] * (4 + 2 * rank) * max(4, call.q.element_size()) <= call.scratch_bytes


def decode_attention(call: Call) -> Tensor:
    """Compose attention of a checked call -> [B, T, H, D] in q's dtype; not differentiable."""
    dtype = torch.promote_types(call.q.dtype, torch.float32)
    if call.q.dtype != dtype:
        return decode_attention(call.to(dtype)).to(call.q.dtype)
    (batch, queries, heads, head_dim), (_, keys, kv_heads, _) = call.q.shape, call.k.shape
    k_BGDS, v_BGSD = call.k.permute(0, 2, 3, 1), call.v.transpose(1, 2)
    stages = [_keys_last(weights) for weights in (call.pre, call.post)]
    outputs = []
    for query in range(queries):
        position = call.query_offset + query
        seen = key_range(position, position, call.window, call.causal, keys)
        pre, post = (_of_query(weights, query, seen, keys) for weights in stages)
        k_MDS, v_MSD = k_BGDS[..., slice(*seen)].flatten(0, 1), v_BGSD[:, :, slice(*seen)].flatten(0, 1)
        # Query heads that share a key/value head are the rows of one product.
        q_MND = call.q[:, query].reshape(batch * kv_heads, -1, head_dim)
        scores_BHS = torch.bmm(q_MND, k_MDS).mul_(call.scale).view(batch, heads, -1)
        logits_BHS = _compose(scores_BHS, pre)
        if call.document_ids is not None:
            documents_BS = call.document_ids[:, slice(*seen)]
            other_BS = documents_BS != call.document_ids[:, position : position + 1]
            logits_BHS.masked_fill_(other_BS.unsqueeze(1), -torch.inf)
        composed_BHS = _compose(logits_BHS.softmax(-1), post)
        out_MND = torch.bmm(composed_BHS.view(batch * kv_heads, -1, composed_BHS.shape[-1]), v_MSD)
        outputs.append(out_MND.view(batch, 1, heads, head_dim))
    return torch.cat(outputs, 1) if queries > 1 else outputs[0]


def _keys_last(weights: ComposeWeights) -> ComposeWeights:
    """The same with k1, k2 as [B, R, H, S] and kg as [B, H, S]."""
    q1, q2, qg, k1, k2, kg = weights.without_unpaired()
    if k1 is not None:
        k1, k2 = k1.permute(0, 2, 3, 1), k2.permute(0, 2, 3, 1)
    return ComposeWeights(q1, q2, qg, k1, k2, None if kg is None else kg.transpose(1, 2))


def _of_query(weights: ComposeWeights, query: int, seen: tuple[int, int], keys: int) -> ComposeWeights:
    """The weights of one query, without the axis T, and of the keys that it sees."""
    q1, q2, qg, k1, k2, kg = weights
    if q1 is not None:
        q1, q2 = q1[:, query], q2[:, query]
    if qg is not None:
        qg = qg[:, query]
    if seen != (0, keys):
        k1, k2, kg = (None if w is None else w[..., slice(*seen)] for w in (k1, k2, kg))
    return ComposeWeights(q1, q2, qg, k1, k2, kg)


def _compose(x_BHS: Tensor, weights: ComposeWeights) -> Tensor:
    """The formula of :class:`ComposeWeights` for one query: q1, q2 [B, R, H], qg [B, H], k1, k2 [B, R, H, S] and kg
    [B, H, S].
    """
    q1, q2, qg, k1, k2, kg = weights
    # y = x + x (qg + kg)
    gate = kg if qg is None else qg.unsqueeze(-1) if kg is None else kg + qg.unsqueeze(-1)
    y_BHS = x_BHS.clone() if gate is None else torch.addcmul(x_BHS, x_BHS, gate)
    # y_h += q2_rh latent_r with latent_r = sum_g q1_rg x_g, and the same by key
    if q1 is not None:
        y_BHS.baddbmm_(q2.mT, torch.bmm(q1, x_BHS))
    if k1 is not None:
        latent_BR1S = (k1 * x_BHS.unsqueeze(1)).sum(2, keepdim=True)
        y_BHS += (k2 * latent_BR1S).sum(1)
    return y_BHS
