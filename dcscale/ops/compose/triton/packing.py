"""The weights of a compose as the kernels want them, and the gradients of those as the caller wants them.

Layout of packed weights and names: common.py. P positions, of queries or of keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dcscale.ops.compose.triton.tiles import Launch, Launcher

_PROGRAM_HEADS, _WARPS = 32, 4
"""Heads that a program packs, and its warps."""


@triton.jit(do_not_specialize=["origin", "positions", "blocks"])
def pack_weights(
    w1_ptr,
    w2_ptr,
    gate_ptr,
    packed_ptr,
    w1_batch_stride,
    w1_stride,
    w1_rank_stride,
    w2_batch_stride,
    w2_stride,
    w2_rank_stride,
    gate_batch_stride,
    gate_stride,
    origin,
    positions,
    blocks,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    ADD_ONE: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """packed [B, blocks, HEADS, rows, BLOCK] from w1, w2 [B, positions, RANK, HEADS] and gate [B, positions, HEADS].

    The first block starts at position ``origin``; positions that do not exist get 0. ADD_ONE: the gate, or 0, plus 1.
    """
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    p = tl.arange(0, BLOCK)[:, None]
    position = origin + block * BLOCK + p
    in_h = h < HEADS
    exists = (position >= 0) & (position < positions) & in_h
    position = position.to(tl.int64)
    ROWS: tl.constexpr = 2 * RANK + (1 if ADD_ONE else GATE)
    packed_ptr += ((batch * blocks + block) * HEADS + h) * (ROWS * BLOCK) + p
    for r in tl.static_range(RANK):
        offset = batch * w1_batch_stride + position * w1_stride + r * w1_rank_stride + h
        w1 = tl.load(w1_ptr + offset, mask=exists, other=0.0)
        tl.store(packed_ptr + r * BLOCK, w1.to(tl.float32), mask=in_h)
        offset = batch * w2_batch_stride + position * w2_stride + r * w2_rank_stride + h
        w2 = tl.load(w2_ptr + offset, mask=exists, other=0.0)
        tl.store(packed_ptr + (RANK + r) * BLOCK, w2.to(tl.float32), mask=in_h)
    if GATE or ADD_ONE:
        gate = tl.zeros([BLOCK, BLOCK_H], tl.float32)
        if GATE:
            gate_ptr += batch * gate_batch_stride + position * gate_stride + h
            gate = tl.load(gate_ptr, mask=exists, other=0.0).to(tl.float32)
        tl.store(packed_ptr + 2 * RANK * BLOCK, gate + (1.0 if ADD_ONE else 0.0), mask=in_h)


@triton.jit(do_not_specialize=["scale", "origin", "positions", "blocks"])
def unpack_gradients(
    sums_ptr,
    dw1_ptr,
    dw2_ptr,
    dgate_ptr,
    scale,
    origin,
    positions,
    blocks,
    RANK: tl.constexpr,
    GATE: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """The inverse of :func:`pack_weights`, times scale; dw1, dw2 and dgate are contiguous."""
    block, batch = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :]
    p = tl.arange(0, BLOCK)[:, None]
    position = origin + block * BLOCK + p
    exists = (position >= 0) & (position < positions) & (h < HEADS)
    line = batch * positions + position
    sums_ptr += ((batch * blocks + block) * HEADS + h) * (ROWS * BLOCK) + p
    for r in tl.static_range(RANK):
        offset = (line * RANK + r) * HEADS + h
        dw1 = tl.load(sums_ptr + r * BLOCK, mask=exists) * scale
        tl.store(dw1_ptr + offset, dw1.to(dw1_ptr.dtype.element_ty), mask=exists)
        dw2 = tl.load(sums_ptr + (RANK + r) * BLOCK, mask=exists) * scale
        tl.store(dw2_ptr + offset, dw2.to(dw2_ptr.dtype.element_ty), mask=exists)
    if GATE:
        dgate = tl.load(sums_ptr + 2 * RANK * BLOCK, mask=exists) * scale
        tl.store(dgate_ptr + line * HEADS + h, dgate.to(dgate_ptr.dtype.element_ty), mask=exists)


class Frame(NamedTuple):
    """Positions in blocks, as the kernels want weights. The blocks hold all positions of the tensors."""

    origin: int
    """Position that the first block starts with; may be negative."""
    positions: int
    """Of all blocks."""
    block: int

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.positions // self.block


class Side(NamedTuple):
    """The terms of one compose by query, or by key, packed for the kernels."""

    weights: Tensor
    """float32 [B, blocks, H, rows, block]."""
    rank: int
    gate: bool
    frame: Frame


class Sides(NamedTuple):
    """One compose, packed for the kernels."""

    by_query: Side
    by_key: Side

    @property
    def constants(self) -> dict[str, int]:
        """Of the kernels that compose."""
        return {"QUERY_RANK": self.by_query.rank, "KEY_RANK": self.by_key.rank, "KEY_GATE": int(self.by_key.gate)}


def pack(weights: Sequence[Tensor | None], rows: Tensor, frame: Frame, add_one: bool, launch: Launcher) -> Side:
    """Pack one side of a compose.

    Args:
        weights: w1 and w2 [B, P, R, H], both or neither, and gate [B, P, H].
        rows: empty tensor [B, P, 0, H].
        frame: of the blocks.
        add_one: add 1 to the gate, or take 1 for an absent gate.
        launch: what to do with the launch.
    """
    w1, w2, gate = (w if w is None or w.stride(-1) == 1 else w.contiguous() for w in weights)
    batch, positions, _, heads = rows.shape
    rank = 0 if w1 is None or w2 is None else w1.shape[2]
    lines = 2 * rank + (gate is not None or add_one)
    packed = rows.new_empty(batch, frame.blocks, heads, lines, frame.block, dtype=torch.float32)
    side = Side(packed, rank, gate is not None, frame)
    if lines:
        tensors = {"w1_ptr": w1 if rank else packed, "w2_ptr": w2 if rank else packed}
        tensors |= {"gate_ptr": packed if gate is None else gate, "packed_ptr": packed}
        strides = {}
        for name, w in (("w1", w1), ("w2", w2)):
            sizes = w.stride() if rank else (0, 0, 0)
            strides |= {f"{name}_{of}": size for of, size in zip(("batch_stride", "stride", "rank_stride"), sizes)}
        sizes = (0, 0) if gate is None else gate.stride()
        strides |= {"gate_batch_stride": sizes[0], "gate_stride": sizes[1]}
        numbers = {"origin": frame.origin, "positions": positions, "blocks": frame.blocks}
        constants = {"ADD_ONE": add_one, **_constants(side)}
        launch(Launch("pack_weights", pack_weights, _grid(packed), tensors | strides | numbers, constants, _WARPS))
    return side


def unpack(side: Side, sums: Tensor, rows: Tensor, scale: float, launch: Launcher) -> tuple[Tensor | None, ...]:
    """The gradients of w1, w2 and gate, in the dtype of ``rows``; None for absent ones.

    Args:
        side: the packed weights.
        sums: their gradients [B, blocks, H, rows, block], with blocks of any size and maybe more rows.
        rows: empty tensor [B, P, 0, H].
        scale: factor on the gradients.
        launch: what to do with the launch.
    """
    batch, positions, _, heads = rows.shape
    shape = (batch, positions, side.rank, heads)
    dw1, dw2 = (rows.new_empty(shape), rows.new_empty(shape)) if side.rank else (None, None)
    dgate = rows.new_empty(batch, positions, heads) if side.gate else None
    if side.rank or side.gate:
        found = {"dw1_ptr": dw1, "dw2_ptr": dw2, "dgate_ptr": dgate}
        tensors = {"sums_ptr": sums, **{name: sums if x is None else x for name, x in found.items()}}
        numbers = {"scale": scale, "origin": side.frame.origin, "positions": positions, "blocks": sums.shape[1]}
        constants = {"ROWS": sums.shape[3], **_constants(side), "BLOCK": sums.shape[4]}
        launch(Launch("unpack_gradients", unpack_gradients, _grid(sums), tensors | numbers, constants, _WARPS))
    return dw1, dw2, dgate


def _grid(packed: Tensor) -> tuple[int, int, int]:
    batch, blocks, heads, _, _ = packed.shape
    return blocks * batch, triton.cdiv(heads, _PROGRAM_HEADS), 1


def _constants(side: Side) -> dict[str, int]:
    sizes = {"HEADS": side.weights.shape[2], "BLOCK": side.frame.block, "BLOCK_H": _PROGRAM_HEADS}
    return {"RANK": side.rank, "GATE": int(side.gate), **sizes}
