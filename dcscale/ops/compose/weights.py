"""The dynamic weights of one compose, and how far compose is from the identity.

Axes in names: B batch, T queries, S keys, R rank, H query heads; J stacks the ranks of both branches.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ComposeWeights(NamedTuple):
    """Weights of one compose (DCMHA, arXiv 2405.08553, section 3) of scores or probabilities A [B, H, T, S]::

        compose(A)[b,h,t,s] = A[b,h,t,s] * (1 + qg[b,t,h] + kg[b,s,h])
                            + sum_r q2[b,t,r,h] * (sum_g q1[b,t,r,g] * A[b,g,t,s])
                            + sum_r k2[b,s,r,h] * (sum_g k1[b,s,r,g] * A[b,g,t,s])

    Any of them may be None; a term with a missing factor is left out. The inner sums over g are called latents: R
    matrices [T, S] without a head axis.

    It is a tuple so that code that walks through a module's outputs (DeepSpeed's ZeRO-3 hooks, torch's pytrees) finds
    the tensors.
    """

    q1: Tensor | None = None
    """[B, T, R, H]: from heads to the latents, by query."""
    q2: Tensor | None = None
    """[B, T, R, H]: from the latents to heads, by query."""
    qg: Tensor | None = None
    """[B, T, H]: gate by query."""
    k1: Tensor | None = None
    """[B, S, R, H]: as q1, by key."""
    k2: Tensor | None = None
    """[B, S, R, H]: as q2, by key."""
    kg: Tensor | None = None
    """[B, S, H]: gate by key."""

    def tensors(self) -> dict[str, Tensor]:
        """The weights that are present, by name."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}

    def without_unpaired(self) -> ComposeWeights:
        """The same without low-rank factors whose partner is missing: their term is left out anyway."""
        q1, q2 = (None, None) if self.q1 is None or self.q2 is None else (self.q1, self.q2)
        k1, k2 = (None, None) if self.k1 is None or self.k2 is None else (self.k1, self.k2)
        return ComposeWeights(q1, q2, self.qg, k1, k2, self.kg)


def identity_distance(weights: ComposeWeights) -> Tensor:
    """How far compose is from the identity: the root mean square over (b, t) of ``||M - I||_F / sqrt(H)``.

    M [H, H] is what compose does to the heads where query and key are the same token::

        M - I = diag(qg + kg) + q2^T q1 + k2^T k1

    Returns:
        A float32 scalar; 0 without weights.

    Raises:
        ValueError: queries and keys are not the same positions (T != S).
    """
    present = weights.tensors()
    if not present:
        return torch.zeros(())
    if len({tensor.shape[:2] for tensor in present.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
        raise ValueError(f"identity_distance needs as many queries as keys, got weights of shapes {shapes}")
    any_weight = next(iter(present.values()))
    heads = any_weight.shape[-1]
    gates = [gate.float() for gate in (weights.qg, weights.kg) if gate is not None]
    gate_BTH = sum(gates, any_weight.new_zeros(heads).float())
    square_BT = gate_BTH.square().sum(-1)

    pairs = [(weights.q1, weights.q2), (weights.k1, weights.k2)]
    pairs = [(w1.float(), w2.float()) for w1, w2 in pairs if w1 is not None and w2 is not None]
    if pairs:
        # With U = w2 and V = w1 as [J, H]:
        #   ||diag(g) + U^T V||^2 = ||g||^2 + 2 sum_jh g_h V_jh U_jh + sum_ij (V V^T)_ij (U U^T)_ij
        # so nothing of size H x H is built for each token.
        w1_BTJH, w2_BTJH = (torch.cat(factors, dim=2) for factors in zip(*pairs))
        cross_BT = (gate_BTH.unsqueeze(-2) * w1_BTJH * w2_BTJH).sum((-2, -1))
        gram_BTJJ = (w1_BTJH @ w1_BTJH.mT) * (w2_BTJH @ w2_BTJH.mT)
        square_BT = square_BT + 2 * cross_BT + gram_BTJJ.sum((-2, -1))
    # Where the terms cancel, rounding may leave a tiny negative number.
    return (square_BT.mean() / heads).clamp(min=0).sqrt()
