"""Cross entropy from hidden states, without materializing the logits of all tokens at once.

Axes in names: B batch, T tokens, N = B * T, E model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
"""Target of a token that does not count towards the loss, as in torch's cross_entropy."""


def bits_per_byte(loss: float, text_bytes_per_target: float) -> float:
    """Convert a loss in nats per target to bits per byte of text, which is comparable between tokenizers."""
    return loss / math.log(2) / text_bytes_per_target


def cross_entropy_sum(hidden_BTE: Tensor, weight_VE: Tensor, targets_BT: Tensor, chunk: int) -> Tensor:
    """Sum of ``-log softmax(hidden @ weight^T)[target]`` over all targets other than :data:`IGNORE_INDEX`.

    Args:
        hidden_BTE: final hidden states.
        weight_VE: output projection, same dtype.
        targets_BT: token ids, int64; IGNORE_INDEX for tokens that do not count.
        chunk: tokens whose logits exist at once; backward recomputes them. 0 for all tokens, without recomputation.

    Returns:
        A float32 scalar (float64 for float64 input). The matrix product is in hidden's dtype, the rest in float32.

    Raises:
        ValueError: the shapes do not match, or chunk is negative.
    """
    if hidden_BTE.shape[:-1] != targets_BT.shape or hidden_BTE.shape[-1] != weight_VE.shape[-1] or weight_VE.dim() != 2:
        raise ValueError(
            f"hidden {tuple(hidden_BTE.shape)}, weight {tuple(weight_VE.shape)} and targets {tuple(targets_BT.shape)} "
            f"do not match: expected [B, T, E], [V, E] and [B, T]"
        )
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}, expected a number of tokens, or 0 for all at once")
    hidden_NE, targets_N = hidden_BTE.flatten(0, -2), targets_BT.flatten()
    if chunk == 0 or chunk >= targets_N.numel():
        return _loss_sum(hidden_NE, weight_VE, targets_N)
    # Backward recomputes a chunk's logits instead of keeping them. There is no dropout, so no RNG state to preserve.
    parts = [
        checkpoint(_loss_sum, hidden, weight_VE, targets, use_reentrant=False, preserve_rng_state=False)
        for hidden, targets in zip(hidden_NE.split(chunk), targets_N.split(chunk))
    ]
    return torch.stack(parts).sum()


def _loss_sum(hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_NE, weight_VE)
    # The softmax of 16-bit logits needs float32.
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
