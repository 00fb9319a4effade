"""The dynamic weights of one compose, and how far they are from doing nothing.

Axes in names: B batch, T queries, S keys, R rank, H query heads; J stacks the ranks of both branches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ComposeWeights(NamedTuple):
    """Weights of one compose (DCMHA paper, arXiv 2405.08553, section 3), which acts on maps A [B, H, T, S]::

        compose(A)[b,h,t,s] = A[b,h,t,s] * (1 + qg[b,t,h] + kg[b,s,h])
                            + sum_r q2[b,t,r,h] * (sum_g q1[b,t,r,g] * A[b,g,t,s])
                            + sum_r k2[b,s,r,h] * (sum_g k1[b,s,r,g] * A[b,g,t,s])

    Any of them may be None; a term with a missing factor is left out. It is a tuple because whoever walks through a
    module's outputs (DeepSpeed's ZeRO-3 hooks, torch's pytrees) must find the tensors.
    """

    q1: Tensor | None = None
    """[B, T, R, H]: from heads to the latent maps, by query."""
    q2: Tensor | None = None
    """[B, T, R, H]: from the latent maps to heads, by query."""
    qg: Tensor | None = None
    """[B, T, H]: gate by query."""
    k1: Tensor | None = None
    """[B, S, R, H]: as q1, by key."""
    k2: Tensor | None = None
    """[B, S, R, H]: as q2, by key."""
    kg: Tensor | None = None
    """[B, S, H]: gate by key."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that are present, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


def identity_distance(weights: ComposeWeights) -> Tensor:
    """How far compose is from the identity: the root mean square over (b, t) of ``||M - I||_F / sqrt(H)``.

    M [H, H] is what compose does to the heads where the query and the key are the same token::

        M - I = diag(qg + kg) + q2^T q1 + k2^T k1

    Queries and keys must be the same positions (T = S). The result is a float32 scalar; 0 without weights.
    """
    present = weights.tensors()
    if not present:
        return torch.zeros(())
    if len({tensor.shape[:2] for tensor in present.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
        raise ValueError(f"identity_distance needs as many queries as keys, got weights of shapes {shapes}")
    some = next(iter(present.values()))
    heads = some.shape[-1]
    gate_BTH = sum((g.float() for g in (weights.qg, weights.kg) if g is not None), some.new_zeros(heads).float())
    square_BT = gate_BTH.square().sum(-1)

    pairs = [(weights.q1, weights.q2), (weights.k1, weights.k2)]
    pairs = [(into.float(), out_of.float()) for into, out_of in pairs if into is not None and out_of is not None]
    if pairs:
        # ||diag(g) + U^T V||^2 from products of size J x J: nothing of size H x H for each token.
        into_BTJH, out_of_BTJH = (torch.cat(side, dim=2) for side in zip(*pairs))
        cross_BT = (gate_BTH.unsqueeze(-2) * into_BTJH * out_of_BTJH).sum((-2, -1))
        gram_BTJJ = (into_BTJH @ into_BTJH.mT) * (out_of_BTJH @ out_of_BTJH.mT)
        square_BT = square_BT + 2 * cross_BT + gram_BTJJ.sum((-2, -1))
    # Rounding may leave a tiny negative number where the terms cancel.
    return (square_BT.mean() / heads).clamp(min=0).sqrt()
