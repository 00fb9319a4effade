"""Cross entropy from hidden states, without the logits of all tokens at once.

Axes in names: B batch, T tokens, N = B * T, E model width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE = -100
"""Target of a token that does not count."""


def bits_per_byte(loss: float, text_bytes_per_target: float) -> float:
    """Bits needed for a byte of the text, from nats a target: comparable between tokenizers."""
    return loss / math.log(2) / text_bytes_per_target


def cross_entropy_sum(hidden_BTE: Tensor, weight_VE: Tensor, targets_BT: Tensor, chunk: int) -> Tensor:
    """The sum over targets other than -100 of ``-log softmax(hidden @ weight^T)[target]``: a float32 scalar.

    The logits leave the product in hidden's type and are float32 from there on (float64 stays float64, in the result
    too). Those of ``chunk`` tokens exist at once (0: of all), and backward computes them again.
    """
    if hidden_BTE.shape[:-1] != targets_BT.shape or hidden_BTE.shape[-1] != weight_VE.shape[-1] or weight_VE.dim() != 2:
        raise ValueError(
            f"hidden {tuple(hidden_BTE.shape)}, weight {tuple(weight_VE.shape)} and targets {tuple(targets_BT.shape)} "
            f"do not fit: expected [B, T, E], [V, E] and [B, T]"
        )
    if chunk < 0:
        raise ValueError(f"chunk is {chunk}, expected a number of tokens, or 0 for all at once")
    hidden_NE, targets_N = hidden_BTE.flatten(0, -2), targets_BT.flatten()
    if chunk == 0 or chunk >= targets_N.numel():
        return _sum_of_losses(hidden_NE, weight_VE, targets_N)
    parts = [
        checkpoint(_sum_of_losses, hidden, weight_VE, targets, use_reentrant=False, preserve_rng_state=False)
        for hidden, targets in zip(hidden_NE.split(chunk), targets_N.split(chunk))
    ]
    return torch.stack(parts).sum()


def _sum_of_losses(hidden_NE: Tensor, weight_VE: Tensor, targets_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_NE, weight_VE)
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE, reduction="sum")
