"""Compose attention on a GPU, one chunk of queries after the other: cuBLAS stages maps, Triton kernels mix them.

A chunk is C queries of n batch rows against the V keys they can see. Forward::

    scores = scale q k^T          cuBLAS, float32                                        [n, H, C, V]
    logits = compose_pre(scores)  mix_forward, in place, and the parts of the softmax's row statistics
    mixed  = compose_post(softmax(logits))      mix_forward, in the type of the input
    out    = mixed v              cuBLAS

Backward computes scores and probabilities again, with the saved statistics, then::

    dmixed = dout v^T             cuBLAS, float32
    dprobabilities, mixed, delta, parts of dpost       mix_backward
    dv    += mixed^T dout         cuBLAS
    dscores, parts of dpre        mix_backward, into the memory of mixed
    dq = scale dscores k,  dk += scale dscores^T q     cuBLAS

Query heads that share a key/value head are rows of one matrix, so grouped heads cost no copy of k and v.

Scratch, in bytes, of a chunk with L = n H C lines of V' keys a map (V' is V up to a multiple of a tile's keys), e the
size of an input element, BT x BS the tile, and Rt, Rs the 2R + 1 gradients of a head's weights by query and by key::

    forward     L V' (4 + e) + 12 L V'/BS + 5 e L D
    backward    L V' (12 + e) + 4 L (V'/BS + 1) (1 + Rt) + 4 n H (C/BT + 1) V' Rs + 5 e L D

that is the maps, the parts of sums over tiles with their sums, and the chunk's slices of q, out and their gradients.
Chunks are made as large as ``scratch_bytes`` allow, but not smaller than one tile's queries of one batch row.
Beside it there are copies of k, v and the weights with heads first and, in backward, float32 gradients of those: sizes
that grow with T, not with T x S.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width, P positions, N = n G,
M = (H / G) C. Weights are packed as the kernels state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.triton_kernels import (
    LOGITS_TO_MIXED,
    SCORES_TO_LOGITS,
    SCORES_TO_PROBABILITIES,
    mix_backward,
    mix_forward,
)
from dcscale.ops.compose.triton_tiles import Tile, tiles_for
from dcscale.ops.visibility import key_range

MAX_CHUNK_QUERIES = 512
"""Queries of a chunk that still read few keys in vain: at the diagonal, half a chunk's."""
_NO_WINDOW = 2**30


class Side(NamedTuple):
    """What one compose has by query or by key, packed for the kernels."""

    weights_BHRP: Tensor
    """float32 [B, H, rows, P]."""
    rank: int
    gate: bool

    @classmethod
    def of(cls, into: Tensor | None, out_of: Tensor | None, gate: Tensor | None, nothing_BH0P: Tensor) -> Side:
        """From [B, P, R, H], the same, and [B, P, H], of which each factor comes with the other.

        ``nothing_BH0P`` is what the result is without any of them.
        """
        low_rank = [] if into is None or out_of is None else [w.permute(0, 3, 2, 1) for w in (into, out_of)]
        gates = [] if gate is None else [gate.permute(0, 2, 1).unsqueeze(2)]
        weights_BHRP = torch.cat([nothing_BH0P, *(w.float() for w in (*low_rank, *gates))], dim=2)
        return cls(weights_BHRP, low_rank[0].shape[2] if low_rank else 0, gate is not None)

    @property
    def rows(self) -> int:
        return 2 * self.rank + self.gate

    def unpack(self, gradient_BHRP: Tensor) -> list[Tensor | None]:
        """into, out_of and gate, of a gradient packed like this; None for what is absent."""
        low_rank = gradient_BHRP[:, :, : 2 * self.rank].permute(0, 3, 2, 1)
        into, out_of = low_rank.split(self.rank, dim=2) if self.rank else (None, None)
        return [into, out_of, gradient_BHRP[:, :, -1].transpose(1, 2) if self.gate else None]


class Gradients(NamedTuple):
    """Of a whole call: of q in its type, of k, v and the weights in float32; of the weights by query and by key."""

    q_BTHD: Tensor
    k_BGSD: Tensor
    v_BGSD: Tensor
    pre: list[Tensor]
    post: list[Tensor]


class Chunk(NamedTuple):
    """Batch rows, queries, and the keys that those see."""

    rows: slice
    queries: slice
    keys: slice

    @property
    def sizes(self) -> tuple[int, int, int]:
        return tuple(part.stop - part.start for part in self)


def scratch_bytes(
    rows: int,
    heads: int,
    queries: int,
    keys: int,
    head_dim: int,
    item: int,
    tile: Tile,
    gradient_rows: tuple[int, int] | None = None,
) -> int:
    """The formula of the module's text; ``gradient_rows`` by query and by key for backward, None for forward."""
    padded = _round_up(keys, tile.keys)
    lines = rows * heads * queries
    tiles_along_keys, tiles_along_queries = padded // tile.keys, math.ceil(queries / tile.queries)
    slices = 5 * item * lines * head_dim
    if gradient_rows is None:
        return lines * padded * (4 + item) + 12 * lines * tiles_along_keys + slices
    by_query, by_key = gradient_rows
    sums_by_query = lines * (tiles_along_keys + 1) * (1 + by_query)
    sums_by_key = rows * heads * (tiles_along_queries + 1) * padded * by_key
    return lines * padded * (12 + item) + 4 * (sums_by_query + sums_by_key) + slices


def _round_up(number: int, step: int) -> int:
    return math.ceil(number / step) * step


class StagedAttention:
    """One call: its inputs, laid out for the products and the kernels."""

    def __init__(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGD: Tensor,
        weights: Sequence[Tensor | None],
        document_ids_BS: Tensor | None,
        window: int | None,
        scale: float,
        query_offset: int,
        scratch_bytes: int,
    ):
        self.budget = scratch_bytes
        self.batch, self.queries, self.heads, self.head_dim = q_BTHD.shape
        self.keys, self.kv_heads = k_BSGD.shape[1:3]
        self.q_BTHD, self.k_BGSD, self.v_BGSD = q_BTHD, _heads_first(k_BSGD), _heads_first(v_BSGD)
        nothing = [self.empty(self.batch, self.heads, 0, positions) for positions in (self.queries, self.keys)]
        self.stages = [
            (Side.of(*stage[:3], nothing[0]), Side.of(*stage[3:], nothing[1])) for stage in (weights[:6], weights[6:])
        ]
        self.document_ids_BS = None if document_ids_BS is None else document_ids_BS.contiguous()
        self.window, self.scale, self.query_offset = window, scale, query_offset
        # On a CPU the kernels are interpreted; any tile will do.
        major, minor = torch.cuda.get_device_capability(q_BTHD.device) if q_BTHD.is_cuda else (9, 0)
        self.tiles = tiles_for(10 * major + minor, max(side.rank for sides in self.stages for side in sides))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output [B, T, H, D], and the statistics of the logits' rows, float32 [B, H, 2, T]."""
        out_BTHD = torch.empty_like(self.q_BTHD, memory_format=torch.contiguous_format)
        statistics_BH2T = self.empty(self.batch, self.heads, 2, self.queries)
        for chunk in self.chunks(self.tiles.forward, None):
            self.forward_chunk(chunk, out_BTHD, statistics_BH2T)
        return out_BTHD, statistics_BH2T

    def forward_chunk(self, chunk: Chunk, out_BTHD: Tensor, statistics_BH2T: Tensor) -> None:
        """Fills in the chunk's part."""
        tile = self.tiles.forward
        rows, queries, keys = chunk.sizes
        maps = self.scores(chunk, tile)
        parts = self.empty(rows, maps.shape[3] // tile.keys, self.heads, 2, queries)
        self.mix(SCORES_TO_LOGITS, chunk, tile, maps, maps, statistics_BH2T, parts)
        statistics_BH2T[chunk.rows, :, :, chunk.queries] = _over_tiles(parts)
        mixed = torch.empty_like(maps, dtype=self.q_BTHD.dtype)
        self.mix(LOGITS_TO_MIXED, chunk, tile, maps, mixed, statistics_BH2T)
        out_NMD = torch.bmm(self.matrices(mixed, keys), self.of_keys(self.v_BGSD, chunk))
        out_BTHD[chunk.rows, chunk.queries] = self.by_position(out_NMD, chunk)

    def backward(self, dout_BTHD: Tensor, statistics_BH2T: Tensor) -> list[Tensor | None]:
        """The gradients of q, k, v and the twelve weights, shaped as those."""
        total = Gradients(
            torch.empty_like(self.q_BTHD, memory_format=torch.contiguous_format),
            *(torch.zeros_like(x, dtype=torch.float32) for x in (self.k_BGSD, self.v_BGSD)),
            *([torch.zeros_like(side.weights_BHRP) for side in sides] for sides in self.stages),
        )
        gradient_rows = tuple(max(side.rows for side in pair) for pair in zip(*self.stages))
        for chunk in self.chunks(self.tiles.backward, gradient_rows):
            self.backward_chunk(chunk, dout_BTHD, statistics_BH2T, total)
        gradients = [total.q_BTHD, total.k_BGSD.transpose(1, 2), total.v_BGSD.transpose(1, 2)]
        for sides, packed in zip(self.stages, (total.pre, total.post)):
            for side, gradient_BHRP in zip(sides, packed):
                gradients += side.unpack(gradient_BHRP)
        return [None if x is None else x.to(self.q_BTHD.dtype).contiguous() for x in gradients]

    def backward_chunk(self, chunk: Chunk, dout_BTHD: Tensor, statistics_BH2T: Tensor, total: Gradients) -> None:
        """Fills in the chunk's part, or adds it."""
        tile = self.tiles.backward
        rows, queries, keys = chunk.sizes
        k_NVD, v_NVD, dk_NVD, dv_NVD = (
            self.of_keys(x, chunk) for x in (self.k_BGSD, self.v_BGSD, total.k_BGSD, total.v_BGSD)
        )
        scores = self.scores(chunk, tile)
        probabilities, gradient = torch.empty_like(scores), torch.empty_like(scores)
        self.mix(SCORES_TO_PROBABILITIES, chunk, tile, scores, probabilities, statistics_BH2T)

        dout_NMD = self.of_queries(dout_BTHD, chunk)
        _product(self.matrices(gradient, keys), dout_NMD, v_NVD.mT)
        operand = torch.empty_like(scores, dtype=self.q_BTHD.dtype)
        delta = self.empty(rows, scores.shape[3] // tile.keys, self.heads, queries)
        self.unmix(True, chunk, tile, (probabilities, gradient, probabilities, delta, operand), total.post)
        _product(dv_NVD, self.matrices(operand, keys).mT, dout_NMD, add=True)

        self.unmix(False, chunk, tile, (scores, gradient, probabilities, delta.sum(1), operand), total.pre)
        dscores_NMV = self.matrices(operand, keys)
        dq_NMD = torch.empty_like(dout_NMD)
        _product(dq_NMD, dscores_NMV, k_NVD, scale=self.scale)
        total.q_BTHD[chunk.rows, chunk.queries] = self.by_position(dq_NMD, chunk)
        _product(dk_NVD, dscores_NMV.mT, self.of_queries(self.q_BTHD, chunk), scale=self.scale, add=True)

    def chunks(self, tile: Tile, gradient_rows: tuple[int, int] | None) -> list[Chunk]:
        """Cuts the call so that each chunk's scratch fits: fewer batch rows first, then fewer queries.

        The last come first: they see the most keys, and what they leave free is large enough for the others.
        """
        chunks = []

        def fits(rows: int, start: int, end: int) -> bool:
            first, last = key_range(self.query_offset + start, self.query_offset + end - 1, self.window)
            item = self.q_BTHD.element_size()
            sizes = (rows, self.heads, end - start, last - first, self.head_dim, item)
            return scratch_bytes(*sizes, tile, gradient_rows) <= self.budget

        rows = self.batch
        while rows > 1 and not fits(rows, max(0, self.queries - MAX_CHUNK_QUERIES), self.queries):
            rows = (rows + 1) // 2
        for row in range(0, self.batch, rows):
            end_row = min(row + rows, self.batch)
            start, size = 0, MAX_CHUNK_QUERIES
            while start < self.queries:
                end = min(start + size, self.queries)
                while size > tile.queries and not fits(end_row - row, start, end):
                    size = max(tile.queries, size // 2)
                    end = min(start + size, self.queries)
                keys = key_range(self.query_offset + start, self.query_offset + end - 1, self.window)
                chunks.append(Chunk(slice(row, end_row), slice(start, end), slice(*keys)))
                start = end
        return chunks[::-1]

    def empty(self, *shape: int) -> Tensor:
        """Scratch in float32."""
        return self.q_BTHD.new_empty(shape, dtype=torch.float32)

    def scores(self, chunk: Chunk, tile: Tile) -> Tensor:
        """scale q k^T: float32 maps [n, H, C, V']."""
        rows, queries, keys = chunk.sizes
        maps = self.empty(rows, self.heads, queries, _round_up(keys, tile.keys))
        q_NMD, k_NVD = self.of_queries(self.q_BTHD, chunk), self.of_keys(self.k_BGSD, chunk)
        # The scale belongs to the product: on q it would be one rounding more.
        _product(self.matrices(maps, keys), q_NMD, k_NVD.mT, scale=self.scale)
        return maps

    def mix(
        self,
        step: int,
        chunk: Chunk,
        tile: Tile,
        maps: Tensor,
        out: Tensor,
        statistics_BH2T: Tensor,
        parts: Tensor | None = None,
    ) -> None:
        """Launches mix_forward."""
        by_query, by_key = sides = self.stages[step == LOGITS_TO_MIXED]
        documents = self.document_ids_BS
        # A tensor that a step does not use is filled in by another.
        tensors = [
            maps,
            out,
            statistics_BH2T,
            maps if parts is None else parts,
            by_query.weights_BHRP,
            by_key.weights_BHRP,
        ]
        tensors.append(maps if documents is None else documents)
        self.launch(mix_forward, tensors, chunk, tile, maps, sides, STEP=step, DOCUMENTS=documents is not None)

    def unmix(
        self, post: bool, chunk: Chunk, tile: Tile, tensors: Sequence[Tensor], dweights_BHRP: Sequence[Tensor]
    ) -> None:
        """Launches mix_backward, and adds the gradient of the weights to ``dweights_BHRP``, by query and by key."""
        by_query, by_key = sides = self.stages[post]
        rows, queries, keys = chunk.sizes
        tiles_along_keys, row_stride = tensors[0].shape[3] // tile.keys, tensors[0].shape[3]
        tiles_along_queries = math.ceil(queries / tile.queries)
        query_parts, key_parts = (
            self.empty(rows, tiles, self.heads, side.rows, positions)
            for tiles, side, positions in (
                (tiles_along_keys, by_query, queries),
                (tiles_along_queries, by_key, row_stride),
            )
        )
        tensors = [*tensors, query_parts, key_parts, by_query.weights_BHRP, by_key.weights_BHRP]
        self.launch(mix_backward, tensors, chunk, tile, tensors[0], sides, POST=post)
        dquery_BHRT, dkey_BHRS = dweights_BHRP
        dquery_BHRT[chunk.rows, :, :, chunk.queries] = query_parts.sum(1)
        dkey_BHRS[chunk.rows, :, :, chunk.keys] += key_parts.sum(1)[..., :keys]

    def launch(
        self,
        kernel: Callable,
        tensors: Sequence[Tensor],
        chunk: Chunk,
        tile: Tile,
        maps: Tensor,
        sides: tuple[Side, Side],
        **constants: Any,
    ) -> None:
        """A program for each tile of ``maps``."""
        rows, queries, keys = chunk.sizes
        by_query, by_key = sides
        row_stride = maps.shape[3]
        grid = (row_stride // tile.keys, math.ceil(queries / tile.queries), rows)
        kernel[grid](
            *tensors,
            queries,
            keys,
            row_stride,
            chunk.rows.start,
            chunk.queries.start,
            chunk.keys.start,
            self.query_offset,
            self.queries,
            self.keys,
            _NO_WINDOW if self.window is None else min(self.window, _NO_WINDOW),
            HEADS=self.heads,
            QUERY_RANK=by_query.rank,
            QUERY_GATE=int(by_query.gate),
            KEY_RANK=by_key.rank,
            KEY_GATE=int(by_key.gate),
            BLOCK_T=tile.queries,
            BLOCK_S=tile.keys,
            num_warps=tile.warps,
            enable_fp_fusion=True,  # newer versions of Triton do not fuse unasked, and the kernels are made of fma
            **constants,
        )

    def of_queries(self, x_BTHD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part [N, M, D] of something by query: the heads that share a key/value head in one matrix."""
        x_nHCD = x_BTHD[chunk.rows, chunk.queries].transpose(1, 2)
        return x_nHCD.reshape(chunk.sizes[0] * self.kv_heads, -1, self.head_dim)

    def of_keys(self, x_BGSD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part [N, V, D], a view."""
        return x_BGSD[chunk.rows].flatten(0, 1)[:, chunk.keys]

    def by_position(self, x_NMD: Tensor, chunk: Chunk) -> Tensor:
        """The inverse of :meth:`of_queries`: [n, C, H, D], a view."""
        rows, queries, _ = chunk.sizes
        return x_NMD.view(rows, self.heads, queries, self.head_dim).transpose(1, 2)

    def matrices(self, maps: Tensor, keys: int) -> Tensor:
        """Maps as [N, M, V], a view without what is behind the keys."""
        return maps.view(maps.shape[0] * self.kv_heads, -1, maps.shape[3])[:, :, :keys]


def _heads_first(x_BSGD: Tensor) -> Tensor:
    return x_BSGD.transpose(1, 2).contiguous()


def _over_tiles(parts: Tensor) -> Tensor:
    """Peaks and sums of exp(x - peak) [n, tiles, H, 2, C] -> the peak and the log of the sum over all, [n, H, 2, C]."""
    peaks, sums = parts.unbind(3)
    peak = peaks.amax(1, keepdim=True)
    log_sum = (peaks - peak).exp_().mul_(sums).sum(1).log_()
    return torch.stack((peak[:, 0], log_sum), dim=2)


def _product(out: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """out = scale a b, plus out if ``add``, batch by batch. A float32 ``out`` of 16-bit a and b is not rounded."""
    options = {"beta": int(add), "alpha": scale, "out": out}
    if out.is_cuda and out.dtype != a.dtype:
        torch.baddbmm(out, a, b, out.dtype, **options)
    elif out.is_cuda or add or out.dtype != torch.float32:
        torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), **options)
    else:
        # cuBLAS scales what comes out of a product; MKL scales what goes into it, which is one rounding more.
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out).mul_(scale)
