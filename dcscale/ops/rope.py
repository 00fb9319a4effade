"""Rotary position embedding (RoFormer, arXiv 2104.09864), in the half layout: dimension i turns with i + dim/2.

Axes in names: B batch, T tokens, H heads, D head width, F frequencies (half of the rotated dimensions).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def rope_table(
    length: int,
    dim: int,
    base: float,
    device: torch.device | str | None = None,
    offset: int = 0,
    scale: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(cos, sin) of ``position * base ** (-2 i / dim)``, float32 [length, dim / 2], from position ``offset`` on.

    ``scale`` makes of these frequencies (radians a token, float64 [dim / 2]) those that are used instead.
    The angles are computed in float64: in float32 those of late positions would be off by up to 1e-3 at 10^4 tokens.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}, expected an even number of rotated dimensions, at least 2")
    inverse_F = base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)
    if scale is not None:
        inverse_F = scale(inverse_F)
    positions_T = torch.arange(offset, offset + length, dtype=torch.float64, device=device)
    angles_TF = torch.outer(positions_T, inverse_F)
    return angles_TF.cos().float(), angles_TF.sin().float()


def llama3_frequencies(
    inverse_F: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """The frequencies of Llama 3.1 for those of plain RoPE, in radians a token.

    With p = original_length / wavelength, a frequency is divided by ``factor`` up to p = low_freq_factor, kept from
    p = high_freq_factor, and goes over linearly in p between (Llama 3.1's ``apply_scaling``, also transformers' type
    ``llama3``).
    """
    periods_F = original_length * inverse_F / (2 * math.pi)
    kept_F = ((periods_F - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inverse_F * (kept_F + (1 - kept_F) / factor)


def apply_rope(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Turn the first 2F dimensions of each head by the table's angles and leave the others; computed in float32.

    The table is [T, F], or [B, T, F] where rows are at different positions.
    Returns x's shape and type (float64 stays float64).
    """
    frequencies = cos_TF.shape[-1]
    if x_BTHD.dim() != 4 or x_BTHD.shape[3] < 2 * frequencies:
        raise ValueError(
            f"x has shape {tuple(x_BTHD.shape)}, "
            f"expected [B, T, H, D] with D >= {2 * frequencies}, twice the width of the table"
        )
    if cos_TF.shape != sin_TF.shape or cos_TF.shape[:-1] not in (x_BTHD.shape[1:2], x_BTHD.shape[:2]):
        raise ValueError(
            f"cos and sin have shapes {tuple(cos_TF.shape)} and {tuple(sin_TF.shape)}, "
            f"expected both [T={x_BTHD.shape[1]}, F], or both [B={x_BTHD.shape[0]}, T, F], for x {tuple(x_BTHD.shape)}"
        )
    work_type = torch.promote_types(x_BTHD.dtype, torch.float32)
    first, second, rest = x_BTHD.split([frequencies, frequencies, x_BTHD.shape[3] - 2 * frequencies], dim=3)
    first, second = first.to(work_type), second.to(work_type)
    cos_TF, sin_TF = cos_TF.unsqueeze(-2), sin_TF.unsqueeze(-2)
    turned = [first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF]
    return torch.cat([part.to(x_BTHD.dtype) for part in turned] + [rest], dim=3)
