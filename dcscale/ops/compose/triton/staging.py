"""Compose attention on a GPU, one chunk of queries after the other: cuBLAS stages maps, Triton kernels mix them.

A chunk is n rows of C queries, each against the V keys it can see. Forward::

    scores = scale q k^T          cuBLAS, float32                                        [n, H, C, V]
    logits = compose_pre(scores)  mix_forward, in place; finish_statistics: the softmax's row statistics
    mixed  = compose_post(softmax(logits))      mix_forward, in the type of the input
    out    = mixed v              cuBLAS

Backward computes scores and probabilities again, with the saved statistics, then::

    dmixed = dout v^T             cuBLAS
    dprobabilities, mixed, delta, parts of dpost       mix_backward
    dv    += mixed^T dout         cuBLAS
    dscores, parts of dpre        mix_backward, into the memory of mixed
    dq = scale dscores k,  dk += scale dscores^T q     cuBLAS

Without a window a row is a batch row, and all its keys up to the last query's count. With one, a batch row is cut into
blocks of about as many queries as the window has keys, and many blocks are the rows of one chunk: a short sequence
would be all launches otherwise. Their keys overlap, so k and v are copied block by block.

Scores are float32. Of 16-bit input, what is rounded once more is what plain PyTorch rounds too: the probabilities (to
float16, which for 0 ... 1 is the finer of the two types) and the gradients of maps, for their traffic bounds the speed.
Query heads that share a key/value head are rows of one matrix, so grouped heads cost no copy of k and v.

Scratch, in bytes, of a chunk with L = n H C lines of V' keys a map (V' is V up to a multiple of a tile's keys), e the
size of an input element, BT x BS the tile, and Rt, Rs the 2R + 1 gradients of a head's weights by query and by key::

    forward     L V' (4 + e) + 8 L V'/BS + 5 e L D                                   + 2 e n G V D
    backward    L V' (4 + 3 e) + 4 L (V'/BS (1 + Rt) + 1) + 4 n H C/BT V' Rs + 5 e L D   + (2 e + 4) n G V D

that is the maps, the parts of sums over tiles, the chunk's slices of q, out and their gradients, and, where there are
blocks, the copies of k and v and a product to be added to their gradients.
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
import torch.nn.functional as F
from torch import Tensor

from dcscale.ops.compose.triton.kernels import (
    LOGITS_TO_MIXED,
    SCORES_TO_LOGITS,
    SCORES_TO_PROBABILITIES,
    add_parts,
    finish_statistics,
    mix_backward,
    mix_forward,
)
from dcscale.ops.compose.triton.tiles import Tile, tiles_for
from dcscale.ops.masks import key_range

MAX_CHUNK_QUERIES = 512
"""Queries of a row of a chunk that still read few keys in vain: at the diagonal, half a row's."""
MIN_BLOCK_QUERIES = 64
"""Queries of a block of a windowed call, at least: the matrix products would be small. Powers of two, both."""
_ALIGNED_KEYS = 16
"""A row's first key is a multiple of this: cuBLAS has slow kernels for matrices that begin anywhere."""
_NO_WINDOW = 2**30
LANES = 128
"""Positions that a program of the kernels which add up parts has."""


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


class Block(NamedTuple):
    """How many queries a row of a windowed call has, and how many keys: a multiple of that."""

    queries: int
    keys: int


def _block_of(window: int, queries: int) -> Block | None:
    """Of about as many queries as the window has keys, so that half of a map is seen; None for short sequences."""
    size = min(MAX_CHUNK_QUERIES, max(MIN_BLOCK_QUERIES, 1 << max(0, window - 2).bit_length()))
    keys = size * (1 + math.ceil((window - 1) / size))
    return Block(size, keys) if queries >= 2 * keys else None


class Chunk(NamedTuple):
    """Batch rows, their queries, and the keys that the first block of these sees; they may begin before position 0."""

    batch: slice
    queries: slice
    keys: slice
    blocks: int = 1
    """How many equal parts the queries have, each a row of its own."""

    @property
    def sizes(self) -> tuple[int, int, int]:
        """n, C and V."""
        batch, queries, keys = (part.stop - part.start for part in self[:3])
        return batch * self.blocks, queries // self.blocks, keys


def scratch_bytes(
    chunk: Chunk,
    heads: int,
    kv_heads: int,
    head_dim: int,
    item: int,
    tile: Tile,
    gradient_rows: tuple[int, int] | None = None,
) -> int:
    """The formula of the module's text; ``gradient_rows`` by query and by key for backward, None for forward."""
    rows, queries, keys = chunk.sizes
    padded = _round_up(keys, tile.keys)
    lines = rows * heads * queries
    tiles_along_keys, tiles_along_queries = padded // tile.keys, math.ceil(queries / tile.queries)
    slices = 5 * item * lines * head_dim
    copied = rows * kv_heads * keys * head_dim if chunk.blocks > 1 else 0
    if gradient_rows is None:
        return lines * padded * (4 + item) + 8 * lines * tiles_along_keys + slices + 2 * item * copied
    by_query, by_key = gradient_rows
    parts_by_query = lines * (tiles_along_keys * (1 + by_query) + 1)
    parts_by_key = rows * heads * tiles_along_queries * padded * by_key
    return lines * padded * (4 + 3 * item) + 4 * (parts_by_query + parts_by_key) + slices + (2 * item + 4) * copied


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
        self.window, self.scale, self.query_offset = window, scale, query_offset
        # Positions before 0 that the first blocks of a windowed call reach.
        self.block = None if window is None else _block_of(window, self.queries)
        self.padding = 0 if self.block is None else max(0, self.block.keys - self.block.queries - query_offset)
        self.first_seen, _ = key_range(query_offset, query_offset, window)
        self.q_BTHD, self.k_BGSD, self.v_BGSD = q_BTHD, self.heads_first(k_BSGD), self.heads_first(v_BSGD)
        nothing = [self.empty(self.batch, self.heads, 0, positions) for positions in (self.queries, self.keys)]
        self.stages = [
            (Side.of(*stage[:3], nothing[0]), Side.of(*stage[3:], nothing[1])) for stage in (weights[:6], weights[6:])
        ]
        self.document_ids_BS = None if document_ids_BS is None else document_ids_BS.contiguous()
        self.gradient_type = q_BTHD.dtype
        self.probability_type = torch.float32 if q_BTHD.dtype == torch.float32 else torch.float16
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
        maps = self.scores(chunk, tile, self.of_queries(self.q_BTHD, chunk), self.of_keys(self.k_BGSD, chunk))
        parts = self.empty(rows, maps.shape[3] // tile.keys, self.heads, 2, queries)
        self.mix(SCORES_TO_LOGITS, chunk, tile, maps, maps, statistics_BH2T, parts)
        self.finish_statistics(chunk, parts, statistics_BH2T)
        mixed = torch.empty_like(maps, dtype=self.q_BTHD.dtype)
        self.mix(LOGITS_TO_MIXED, chunk, tile, maps, mixed, statistics_BH2T)
        self.put(torch.bmm(self.matrices(mixed, keys), self.of_keys(self.v_BGSD, chunk)), chunk, out_BTHD)

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
        by_key = (x[:, :, self.padding :].transpose(1, 2) for x in (total.k_BGSD, total.v_BGSD))
        gradients = [total.q_BTHD, *by_key]
        for sides, packed in zip(self.stages, (total.pre, total.post)):
            for side, gradient_BHRP in zip(sides, packed):
                gradients += side.unpack(gradient_BHRP)
        return [None if x is None else x.to(self.q_BTHD.dtype).contiguous() for x in gradients]

    def backward_chunk(self, chunk: Chunk, dout_BTHD: Tensor, statistics_BH2T: Tensor, total: Gradients) -> None:
        """Fills in the chunk's part, or adds it."""
        tile = self.tiles.backward
        rows, queries, keys = chunk.sizes
        q_NMD, k_NVD = self.of_queries(self.q_BTHD, chunk), self.of_keys(self.k_BGSD, chunk)
        scores = self.scores(chunk, tile, q_NMD, k_NVD)
        probabilities = torch.empty_like(scores, dtype=self.probability_type)
        self.mix(SCORES_TO_PROBABILITIES, chunk, tile, scores, probabilities, statistics_BH2T)

        dout_NMD = self.of_queries(dout_BTHD, chunk)
        gradient = torch.empty_like(scores, dtype=self.gradient_type)
        _product(self.matrices(gradient, keys), dout_NMD, self.of_keys(self.v_BGSD, chunk).mT)
        operand = torch.empty_like(scores, dtype=self.q_BTHD.dtype)
        parts = self.empty(rows, scores.shape[3] // tile.keys, self.heads, queries)
        self.unmix(True, chunk, tile, (probabilities, gradient, probabilities, parts, operand), total.post)
        delta = self.empty(rows, self.heads, queries)
        self.add_parts(parts, delta, Chunk(slice(0, rows), slice(0, queries), slice(0, 0)), queries, False)
        self.add_to_keys(total.v_BGSD, self.matrices(operand, keys).mT, dout_NMD, chunk)

        self.unmix(False, chunk, tile, (scores, gradient, probabilities, delta, operand), total.pre)
        dscores_NMV = self.matrices(operand, keys)
        dq_NMD = torch.empty_like(dout_NMD)
        _product(dq_NMD, dscores_NMV, k_NVD, scale=self.scale)
        self.put(dq_NMD, chunk, total.q_BTHD)
        self.add_to_keys(total.k_BGSD, dscores_NMV.mT, q_NMD, chunk, self.scale)

    def chunks(self, tile: Tile, gradient_rows: tuple[int, int] | None) -> list[Chunk]:
        """Cuts the call so that each chunk's scratch fits.

        The last come first: they see the most keys, and what they leave free is large enough for the others.
        """

        def fits(chunk: Chunk) -> bool:
            item = self.q_BTHD.element_size()
            sizes = self.heads, self.kv_heads, self.head_dim, item
            return scratch_bytes(chunk, *sizes, tile, gradient_rows) <= self.budget

        chunks = [] if self.block is None else self.chunks_of_blocks(fits)
        begin = chunks[-1].queries.stop if chunks else 0
        if begin == self.queries:
            return chunks[::-1]
        rows = self.batch
        while rows > 1 and not fits(self.chunk_at(0, rows, max(begin, self.queries - MAX_CHUNK_QUERIES), self.queries)):
            rows = (rows + 1) // 2
        for row in range(0, self.batch, rows):
            start, size = begin, MAX_CHUNK_QUERIES
            while start < self.queries:
                chunk = self.chunk_at(row, rows, start, start + size)
                while size > tile.queries and not fits(chunk):
                    size = max(tile.queries, size // 2)
                    chunk = self.chunk_at(row, rows, start, start + size)
                chunks.append(chunk)
                start = chunk.queries.stop
        return chunks[::-1]

    def chunk_at(self, row: int, rows: int, start: int, end: int) -> Chunk:
        """These queries, as far as there are so many, of these batch rows, likewise."""
        end = min(end, self.queries)
        first, last = key_range(self.query_offset + start, self.query_offset + end - 1, self.window)
        return Chunk(
            slice(row, min(row + rows, self.batch)), slice(start, end), slice(first - first % _ALIGNED_KEYS, last)
        )

    def chunks_of_blocks(self, fits: Callable[[Chunk], bool]) -> list[Chunk]:
        """All whole blocks of a windowed call, in as few chunks as fit; none if not even one block fits."""
        queries, keys = self.block
        blocks = self.queries // queries

        def chunk_of(row: int, rows: int, block: int, count: int) -> Chunk:
            first, last = block * queries, min(block + count, blocks) * queries
            stop = self.query_offset + first + queries
            batch = slice(row, min(row + rows, self.batch))
            return Chunk(batch, slice(first, last), slice(stop - keys, stop), (last - first) // queries)

        rows, count = self.batch, blocks
        while rows > 1 and not fits(chunk_of(0, rows, 0, count)):
            rows = (rows + 1) // 2
        while count > 1 and not fits(chunk_of(0, rows, 0, count)):
            count = (count + 1) // 2
        if count < 2:
            return []
        return [
            chunk_of(row, rows, block, count) for row in range(0, self.batch, rows) for block in range(0, blocks, count)
        ]

    def empty(self, *shape: int) -> Tensor:
        """Scratch in float32."""
        return self.q_BTHD.new_empty(shape, dtype=torch.float32)

    def scores(self, chunk: Chunk, tile: Tile, q_NMD: Tensor, k_NVD: Tensor) -> Tensor:
        """scale q k^T: float32 maps [n, H, C, V']."""
        rows, queries, keys = chunk.sizes
        maps = self.empty(rows, self.heads, queries, _round_up(keys, tile.keys))
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
        self.add_parts(query_parts, dquery_BHRT, chunk._replace(keys=chunk.queries), queries, False)
        self.add_parts(key_parts, dkey_BHRS, chunk, keys, True)

    def finish_statistics(self, chunk: Chunk, parts: Tensor, statistics_BH2T: Tensor) -> None:
        """Launches it: the chunk's part of the statistics from [n, tiles along keys, H, 2, C]."""
        rows, queries, _ = chunk.sizes
        finish_statistics[(math.ceil(queries / LANES), self.heads, rows)](
            parts,
            statistics_BH2T,
            queries,
            parts.shape[1],
            chunk.blocks,
            chunk.batch.start,
            chunk.queries.start,
            self.queries,
            HEADS=self.heads,
            BLOCK=LANES,
        )

    def add_parts(self, parts: Tensor, sums: Tensor, chunk: Chunk, width: int, add: bool) -> None:
        """Launches it: sums [..., positions] from parts [n, tiles, ..., positions], where ``chunk.keys`` begins."""
        _, queries, _ = chunk.sizes
        lanes = LANES if chunk.blocks == 1 else min(LANES, queries)
        span = (chunk.blocks - 1) * queries + width
        lines = parts[0, 0].numel() // parts.shape[-1]
        if lines == 0:
            return
        add_parts[(math.ceil(span / lanes), lines, chunk.batch.stop - chunk.batch.start)](
            parts,
            sums,
            width,
            queries,
            parts.shape[1],
            chunk.blocks,
            chunk.batch.start,
            chunk.keys.start,
            parts.shape[-1],
            sums.shape[-1],
            ADD=add,
            BLOCK=lanes,
        )

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
            chunk.blocks,
            row_stride,
            chunk.batch.start,
            chunk.queries.start,
            chunk.keys.start,
            self.query_offset,
            self.queries,
            self.keys,
            self.first_seen,
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
        return self.by_row(x_BTHD, chunk).reshape(chunk.sizes[0] * self.kv_heads, -1, self.head_dim)

    def by_row(self, x_BTHD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part of something by query as [batch rows, blocks, H, C, D], a view."""
        return x_BTHD[chunk.batch, chunk.queries].unflatten(1, (chunk.blocks, -1)).transpose(2, 3)

    def put(self, x_NMD: Tensor, chunk: Chunk, out_BTHD: Tensor) -> None:
        """The inverse of :meth:`of_queries`."""
        to = self.by_row(out_BTHD, chunk)
        to.copy_(x_NMD.view(to.shape))

    def heads_first(self, x_BSGD: Tensor) -> Tensor:
        """[B, G, padding + S, D], with zeros before the first key that any query sees."""
        seen_BGSD = x_BSGD[:, self.first_seen :].transpose(1, 2)
        return F.pad(seen_BGSD, (0, 0, self.padding + self.first_seen, 0)).contiguous()

    def of_keys(self, x_BGSD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part [N, V, D]; a view where there is one block."""
        _, queries, keys = chunk.sizes
        start = self.padding + chunk.keys.start
        x_nGSD = x_BGSD[chunk.batch, :, start : start + (chunk.blocks - 1) * queries + keys]
        if chunk.blocks == 1:
            return x_nGSD.flatten(0, 1)
        return x_nGSD.unfold(2, keys, queries).permute(0, 2, 1, 4, 3).reshape(-1, keys, self.head_dim)

    def add_to_keys(self, x_BGSD: Tensor, a: Tensor, b: Tensor, chunk: Chunk, scale: float = 1.0) -> None:
        """Adds the products scale a b [N, V, D] to where :meth:`of_keys` would have them from."""
        if chunk.blocks == 1:
            _product(self.of_keys(x_BGSD, chunk), a, b, scale=scale, add=True)
            return
        _, queries, keys = chunk.sizes
        product_NVD = self.empty(a.shape[0], keys, self.head_dim)
        _product(product_NVD, a, b, scale=scale)
        product = product_NVD.view(-1, chunk.blocks, self.kv_heads, keys, self.head_dim).transpose(1, 2)
        # Part by part of a block's keys, which do not overlap.
        for first in range(0, keys, queries):
            start = self.padding + chunk.keys.start + first
            part = x_BGSD[chunk.batch, :, start : start + chunk.blocks * queries].unflatten(2, (chunk.blocks, queries))
            part += product[:, :, :, first : first + queries]

    def matrices(self, maps: Tensor, keys: int) -> Tensor:
        """Maps as [N, M, V], a view without what is behind the keys."""
        return maps.view(maps.shape[0] * self.kv_heads, -1, maps.shape[3])[:, :, :keys]


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
