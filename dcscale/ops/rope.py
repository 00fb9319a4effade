"""Rotary position embedding (RoFormer, arXiv 2104.09864) in the half-split layout: dimension i pairs with i + dim/2.

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
    """Cosines and sines of the angles ``position * base ** (-2 i / dim)``.

    Args:
        length: number of positions, from ``offset`` on.
        dim: rotated dimensions of a head, even.
        base: theta of RoPE.
        device: where the table is created.
        offset: first position.
        scale: maps the frequencies (radians per token, float64 [dim / 2]) to those that are used instead.

    Returns:
        (cos, sin), each float32 [length, dim / 2].

    Raises:
        ValueError: dim is odd or below 2.
    """
    if dim < 2 or dim % 2:
        raise ValueError(f"dim is {dim}, expected an even number of rotated dimensions, at least 2")
    frequencies_F = base ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / -dim)
    if scale is not None:
        frequencies_F = scale(frequencies_F)
    # float64, because float32 angles are off by up to 1e-3 at position 10^4.
    positions_T = torch.arange(offset, offset + length, dtype=torch.float64, device=device)
    angles_TF = torch.outer(positions_T, frequencies_F)
    return angles_TF.cos().float(), angles_TF.sin().float()


def llama3_frequencies(
    frequencies_F: Tensor, factor: float, low_freq_factor: float, high_freq_factor: float, original_length: int
) -> Tensor:
    """Scale RoPE frequencies for a longer context as Llama 3.1 does (``apply_scaling``; transformers' ``llama3``).

    Let p = original_length / wavelength. A frequency is divided by ``factor`` where p <= low_freq_factor, kept where
    p >= high_freq_factor, and interpolated linearly in p between them.

    Args:
        frequencies_F: of plain RoPE, in radians per token.
        factor: the longest wavelengths are stretched by this.
        low_freq_factor: see above.
        high_freq_factor: see above.
        original_length: context length in tokens before the extension.

    Returns:
        The scaled frequencies [F], in radians per token.
    """
    # wavelength = 2 pi / frequency
    periods_F = original_length * frequencies_F / (2 * math.pi)
    kept_F = ((periods_F - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies_F * (kept_F + (1 - kept_F) / factor)


def apply_rope(x_BTHD: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Rotate the first 2F dimensions of each head by the angles of a :func:`rope_table`; keep the others.

    Args:
        x_BTHD: queries or keys.
        cos_TF: [T, F], or [B, T, F] if the batch rows are at different positions.
        sin_TF: as cos_TF.

    Returns:
        A tensor of x's shape and dtype. It is computed in float32 (float64 for float64) and rounded once.

    Raises:
        ValueError: the shapes do not match.
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
    compute_dtype = torch.promote_types(x_BTHD.dtype, torch.float32)
    if x_BTHD.dtype != compute_dtype:
        return apply_rope(x_BTHD.to(compute_dtype), cos_TF, sin_TF).to(x_BTHD.dtype)
    first, second = x_BTHD[..., :frequencies], x_BTHD[..., frequencies : 2 * frequencies]
    cos_TF, sin_TF = cos_TF.unsqueeze(-2), sin_TF.unsqueeze(-2)
    parts = [first * cos_TF - second * sin_TF, second * cos_TF + first * sin_TF, x_BTHD[..., 2 * frequencies :]]
    return torch.cat(parts, dim=3)
