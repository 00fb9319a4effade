"""The Triton backend on tiles so small that short sequences have several, on a GPU if there is one, else interpreted.

Interpreted, a tile costs as much as on a GPU a million of them, so tests that need several cannot use real ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from dcscale.ops.compose.triton import staging
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import Launch, Launcher, Tile, Tiles
from dcscale.testing.attention import WEIGHTS, AttentionInputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SMALL_TILES = Tiles(Tile(16, 16, 4), Tile(8, 16, 4), Tile(32, 32, 4), block_queries=16)
"""A quarter of the real ones in each direction: products of 2 x 2 blocks, backward in halves of a block."""

BLOCKWISE = SMALL_TILES._replace(product=Tile(16, 16, 4))
"""Products of one block, so that chunks and the rows of windowed calls can be half as large."""


def staged(
    inputs: AttentionInputs,
    dtype: torch.dtype = torch.float32,
    tiles: Tiles = SMALL_TILES,
    launch: Launcher = Launch.run,
) -> StagedAttention:
    """The call of these inputs, in this dtype on :data:`DEVICE`."""
    return StagedAttention(inputs.to(dtype, DEVICE).call(), tiles, launch)


def staged_results(attention: StagedAttention, inputs: AttentionInputs, keep: bool = False) -> dict[str, Tensor]:
    """What :meth:`AttentionInputs.run` returns, on the CPU. With ``keep``, backward takes what forward has kept."""
    kept: list[Any] | None = [] if keep else None
    out, log_sums = attention.forward(kept)
    gradients = attention.backward(inputs.cotangent.to(out.device, out.dtype), log_sums, kept or ()).tensors()
    results = {"out": out, **dict(zip(["q", "k", "v", *WEIGHTS], gradients))}
    return {name: x.cpu() for name, x in results.items() if x is not None}


def quicken_interpreter() -> None:
    """Halve the time of interpreted kernels, for the rest of the process.

    Triton's interpreter replaces Triton's language by its own for each kernel, and again in each call of a device
    function; once is enough. It adds and multiplies all integers twice to find overflows: see :func:`find_overflows`.
    And backward kernels of a warp have few elements, but a tile costs the same whatever its size.
    """
    original = interpreter.InterpretedFunction.__call__

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        if any(tl.core.is_builtin(language.load) for language in (tl, tl.core)):  # not replaced yet
            return original(self, *arguments, **options)
        return self.rewrite()(*arguments, **options)

    interpreter.InterpretedFunction.__call__ = call
    find_overflows(False)
    if DEVICE == "cpu":
        table = staging.tiles_for
        staging.tiles_for = lambda *sizes: table(*sizes)._replace(backward=Tile(32, 64, 4))


def find_overflows(enabled: bool) -> None:
    """Whether interpreted kernels fail when integers overflow."""
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=enabled)
