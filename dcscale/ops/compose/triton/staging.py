"""Compose attention on a GPU, chunk by chunk over the queries: cuBLAS makes the scores, Triton kernels compose them.

A chunk is n rows of C queries, each against the V keys it can see. Forward::

    scores   = scale q k^T           cuBLAS, float32                                        [n, H, C, V]
    logits   = compose_pre(scores)   compose_forward, in place; finish_statistics: max and log-sum-exp of each row
    composed = compose_post(softmax(logits))      compose_forward, in the input's dtype
    out      = composed v            cuBLAS

Backward recomputes scores and probabilities, with the saved statistics, then::

    dcomposed = dout v^T             cuBLAS
    dprobabilities, composed, delta, partial sums of dpost       compose_backward
    dv += composed^T dout            cuBLAS
    dscores, partial sums of dpre    compose_backward, into the memory of composed
    dq = scale dscores k,  dk += scale dscores^T q     cuBLAS

Without a window a row is a batch row, with all keys up to the last query's. With a window, a batch row is cut into
blocks of about as many queries as the window has keys, and many blocks become the rows of one chunk; otherwise launch
overhead would dominate short sequences. The keys of neighbouring blocks overlap, so k and v are copied block by block.

Scores are float32. With 16-bit input, values are rounded where plain PyTorch rounds them too, because the kernels are
bound by memory traffic: probabilities (to float16, which is more precise than bfloat16 on 0 ... 1) and the gradients of
scores and probabilities. Query heads that share a key/value head are rows of one matrix, so k and v are not repeated.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width, P positions; in a chunk
C queries, V keys, N = n G, M = (H / G) C. Weights are packed as the kernels document.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from dcscale.ops.compose.custom_op import Call, Gradients
from dcscale.ops.compose.triton.kernels import (
    LOGITS_TO_COMPOSED,
    SCORES_TO_LOGITS,
    SCORES_TO_PROBABILITIES,
    compose_backward,
    compose_forward,
    finish_statistics,
    reduce_partials,
)
from dcscale.ops.compose.triton.tiles import Chunk, Tile, round_up, scratch_bytes, tiles_for
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import key_range

MAX_CHUNK_QUERIES = 512
"""Queries of a row of a chunk. At the diagonal half of its scores are masked, so more queries waste more work."""
MIN_BLOCK_QUERIES = 64
"""Queries of a block of a windowed call: fewer make the matrix products too small. Both limits are powers of two."""
_KEY_ALIGNMENT = 16
"""A row's first key is a multiple of this, because cuBLAS uses slow kernels for unaligned matrices."""
_NO_WINDOW = 2**30
REDUCE_BLOCK = 128
"""Positions per program of the kernels that reduce partial sums."""


class Side(NamedTuple):
    """The terms of one compose by query, or by key, packed for the kernels."""

    weights_BHRP: Tensor
    """float32 [B, H, rows, P]."""
    rank: int
    gate: bool

    @classmethod
    def of(cls, w1: Tensor | None, w2: Tensor | None, gate: Tensor | None, empty_BH0P: Tensor) -> Side:
        """Pack w1 and w2 [B, P, R, H], both or neither, and gate [B, P, H]. ``empty_BH0P`` packs none of them."""
        low_rank = [] if w1 is None or w2 is None else [w.permute(0, 3, 2, 1) for w in (w1, w2)]
        gates = [] if gate is None else [gate.permute(0, 2, 1).unsqueeze(2)]
        weights_BHRP = torch.cat([empty_BH0P, *(w.float() for w in (*low_rank, *gates))], dim=2)
        return cls(weights_BHRP, low_rank[0].shape[2] if low_rank else 0, gate is not None)

    @property
    def rows(self) -> int:
        """Rows of a head: 2R + 1 with all weights."""
        return 2 * self.rank + self.gate

    def unpack(self, gradient_BHRP: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of w1, w2 and gate from one packed like the weights; None for absent weights."""
        low_rank = gradient_BHRP[:, :, : 2 * self.rank].permute(0, 3, 2, 1)
        w1, w2 = low_rank.split(self.rank, dim=2) if self.rank else (None, None)
        return w1, w2, gradient_BHRP[:, :, -1].transpose(1, 2) if self.gate else None


class Sides(NamedTuple):
    """One compose, packed for the kernels."""

    by_query: Side
    by_key: Side

    @classmethod
    def of(cls, weights: ComposeWeights, empty_BH0T: Tensor, empty_BH0S: Tensor) -> Sides:
        """Pack the weights."""
        w = weights
        return cls(Side.of(w.q1, w.q2, w.qg, empty_BH0T), Side.of(w.k1, w.k2, w.kg, empty_BH0S))

    def unpack(self, gradients_BHRP: Sequence[Tensor]) -> ComposeWeights:
        """The gradients of the weights from packed ones, by query and by key."""
        by_query, by_key = gradients_BHRP
        return ComposeWeights(*self.by_query.unpack(by_query), *self.by_key.unpack(by_key))


class GradientSums(NamedTuple):
    """Gradients that the chunks fill in: q in its dtype, the others in float32; the weights by query and by key."""

    q_BTHD: Tensor
    k_BGSD: Tensor
    v_BGSD: Tensor
    pre: list[Tensor]
    post: list[Tensor]


class Block(NamedTuple):
    """Size of a row in a windowed call; ``keys`` is a multiple of ``queries``."""

    queries: int
    keys: int


def _block_of(window: int, queries: int) -> Block | None:
    """A block of about as many queries as the window has keys, so that half of its scores are visible.

    None for short sequences, which are not worth cutting.
    """
    # The power of two from window - 1 on, within the limits; then enough keys for the block's first query.
    size = min(MAX_CHUNK_QUERIES, max(MIN_BLOCK_QUERIES, 1 << max(0, window - 2).bit_length()))
    keys = size * (1 + math.ceil((window - 1) / size))
    return Block(size, keys) if queries >= 2 * keys else None


class StagedAttention:
    """One call: its inputs in the layout of the products and the kernels."""

    def __init__(self, call: Call):
        self.budget = call.scratch_bytes
        self.batch, self.queries, self.heads, self.head_dim = call.q.shape
        self.keys, self.kv_heads = call.k.shape[1:3]
        self.window, self.scale, self.query_offset = call.window, call.scale, call.query_offset
        self.block = None if call.window is None else _block_of(call.window, self.queries)
        # Positions before 0 that the keys of the first blocks reach.
        self.padding = 0 if self.block is None else max(0, self.block.keys - self.block.queries - self.query_offset)
        self.first_visible, _ = key_range(self.query_offset, self.query_offset, self.window)
        self.q_BTHD, self.k_BGSD, self.v_BGSD = call.q, self.heads_first(call.k), self.heads_first(call.v)
        empty_BH0T, empty_BH0S = (self.empty(self.batch, self.heads, 0, size) for size in (self.queries, self.keys))
        self.pre, self.post = (Sides.of(weights, empty_BH0T, empty_BH0S) for weights in (call.pre, call.post))
        self.document_ids_BS = None if call.document_ids is None else call.document_ids.contiguous()
        self.gradient_dtype = call.q.dtype
        self.probability_dtype = torch.float32 if call.q.dtype == torch.float32 else torch.float16
        # On a CPU the kernels are interpreted, and any tile works.
        major, minor = torch.cuda.get_device_capability(call.q.device) if call.q.is_cuda else (9, 0)
        self.tiles = tiles_for(10 * major + minor, max(side.rank for side in (*self.pre, *self.post)))

    def forward(self) -> tuple[Tensor, Tensor]:
        """The output [B, T, H, D], and the statistics of the rows of logits, float32 [B, H, 2, T]."""
        out_BTHD = torch.empty_like(self.q_BTHD, memory_format=torch.contiguous_format)
        statistics_BH2T = self.empty(self.batch, self.heads, 2, self.queries)
        for chunk in self.chunks(self.tiles.forward, None):
            self.forward_chunk(chunk, out_BTHD, statistics_BH2T)
        return out_BTHD, statistics_BH2T

    def forward_chunk(self, chunk: Chunk, out_BTHD: Tensor, statistics_BH2T: Tensor) -> None:
        """Write the chunk's part of both results."""
        tile = self.tiles.forward
        rows, queries, keys = chunk.sizes
        scores = self.scores(chunk, tile, self.of_queries(self.q_BTHD, chunk), self.of_keys(self.k_BGSD, chunk))
        partials = self.empty(rows, scores.shape[3] // tile.keys, self.heads, 2, queries)
        # Logits overwrite the scores.
        logits = scores
        self.compose_forward(SCORES_TO_LOGITS, chunk, tile, scores, logits, statistics_BH2T, partials)
        self.finish_statistics(chunk, partials, statistics_BH2T)
        composed = torch.empty_like(logits, dtype=self.q_BTHD.dtype)
        self.compose_forward(LOGITS_TO_COMPOSED, chunk, tile, logits, composed, statistics_BH2T)
        out_NMD = torch.bmm(self.matrices(composed, keys), self.of_keys(self.v_BGSD, chunk))
        self.store_queries(out_NMD, chunk, out_BTHD)

    def backward(self, dout_BTHD: Tensor, statistics_BH2T: Tensor) -> Gradients:
        """The gradients of the call."""
        total = GradientSums(
            torch.empty_like(self.q_BTHD, memory_format=torch.contiguous_format),
            *(torch.zeros_like(x, dtype=torch.float32) for x in (self.k_BGSD, self.v_BGSD)),
            *([torch.zeros_like(side.weights_BHRP) for side in sides] for sides in (self.pre, self.post)),
        )
        gradient_rows = tuple(max(side.rows for side in pair) for pair in zip(self.pre, self.post))
        for chunk in self.chunks(self.tiles.backward, gradient_rows):
            self.backward_chunk(chunk, dout_BTHD, statistics_BH2T, total)

        def finish(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.to(self.q_BTHD.dtype).contiguous()

        dk, dv = (finish(x[:, :, self.padding :].transpose(1, 2)) for x in (total.k_BGSD, total.v_BGSD))
        dpre, dpost = (
            ComposeWeights(*map(finish, sides.unpack(packed)))
            for sides, packed in ((self.pre, total.pre), (self.post, total.post))
        )
        return Gradients(finish(total.q_BTHD), dk, dv, dpre, dpost)

    def backward_chunk(self, chunk: Chunk, dout_BTHD: Tensor, statistics_BH2T: Tensor, total: GradientSums) -> None:
        """Write the chunk's part of q's gradient, and add to the others."""
        tile = self.tiles.backward
        rows, queries, keys = chunk.sizes
        q_NMD, k_NVD = self.of_queries(self.q_BTHD, chunk), self.of_keys(self.k_BGSD, chunk)
        scores = self.scores(chunk, tile, q_NMD, k_NVD)
        probabilities = torch.empty_like(scores, dtype=self.probability_dtype)
        self.compose_forward(SCORES_TO_PROBABILITIES, chunk, tile, scores, probabilities, statistics_BH2T)

        # dP' = dout v^T; the kernel replaces it by dP
        dout_NMD = self.of_queries(dout_BTHD, chunk)
        gradient = torch.empty_like(scores, dtype=self.gradient_dtype)
        _product(self.matrices(gradient, keys), dout_NMD, self.of_keys(self.v_BGSD, chunk).mT)
        operand = torch.empty_like(scores, dtype=self.q_BTHD.dtype)
        delta_partials = self.empty(rows, scores.shape[3] // tile.keys, self.heads, queries)
        self.compose_backward(
            True, chunk, tile, probabilities, gradient, probabilities, delta_partials, operand, total.post
        )
        # delta = sum_s P dP over all tiles. The rows are independent, so reduce them as the batch rows of one block.
        delta = self.empty(rows, self.heads, queries)
        all_rows = Chunk(slice(0, rows), slice(0, queries), slice(0, 0))
        self.reduce_partials(delta_partials, delta, all_rows, queries, add=False)
        # dv += P'^T dout; operand is P'
        self.add_to_keys(total.v_BGSD, self.matrices(operand, keys).mT, dout_NMD, chunk)

        # dS = compose_pre^T(P (dP - delta)), into operand
        self.compose_backward(False, chunk, tile, scores, gradient, probabilities, delta, operand, total.pre)
        dscores_NMV = self.matrices(operand, keys)
        dq_NMD = torch.empty_like(dout_NMD)
        _product(dq_NMD, dscores_NMV, k_NVD, scale=self.scale)
        self.store_queries(dq_NMD, chunk, total.q_BTHD)
        self.add_to_keys(total.k_BGSD, dscores_NMV.mT, q_NMD, chunk, self.scale)

    def chunks(self, tile: Tile, gradient_rows: tuple[int, int] | None) -> list[Chunk]:
        """Cut the call so that each chunk's scratch fits; arguments as :func:`scratch_bytes`.

        The last chunks come first: they see the most keys, and the memory that they free is large enough for the rest.
        """

        def fits(chunk: Chunk) -> bool:
            item = self.q_BTHD.element_size()
            sizes = self.heads, self.kv_heads, self.head_dim, item
            return scratch_bytes(chunk, *sizes, tile, gradient_rows) <= self.budget

        chunks = [] if self.block is None else self.chunks_of_blocks(fits)
        # Queries that do not fill a block, or all without blocks, are cut by rows and sizes.
        begin = chunks[-1].queries.stop if chunks else 0
        if begin == self.queries:
            return chunks[::-1]
        # First reduce the batch rows of a chunk, judged by the last chunk, then its queries.
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
        """The chunk of up to ``rows`` batch rows from ``row`` on, and of the queries [start, end) that exist."""
        end = min(end, self.queries)
        first, last = key_range(self.query_offset + start, self.query_offset + end - 1, self.window)
        first -= first % _KEY_ALIGNMENT
        return Chunk(slice(row, min(row + rows, self.batch)), slice(start, end), slice(first, last))

    def chunks_of_blocks(self, fits: Callable[[Chunk], bool]) -> list[Chunk]:
        """All complete blocks of a windowed call, in as few chunks as fit; none if not even two blocks fit."""
        queries, keys = self.block
        blocks = self.queries // queries

        def chunk_of(row: int, rows: int, block: int, count: int) -> Chunk:
            first, last = block * queries, min(block + count, blocks) * queries
            stop = self.query_offset + first + queries
            batch = slice(row, min(row + rows, self.batch))
            return Chunk(batch, slice(first, last), slice(stop - keys, stop), (last - first) // queries)

        # Reduce the batch rows first, then the blocks, until a chunk fits.
        rows, count = self.batch, blocks
        while rows > 1 and not fits(chunk_of(0, rows, 0, count)):
            rows = (rows + 1) // 2
        while count > 1 and not fits(chunk_of(0, rows, 0, count)):
            count = (count + 1) // 2
        if count < 2:  # a single block is not worth copying its keys
            return []
        return [
            chunk_of(row, rows, block, count) for row in range(0, self.batch, rows) for block in range(0, blocks, count)
        ]

    def empty(self, *shape: int) -> Tensor:
        """Uninitialized float32 scratch."""
        return self.q_BTHD.new_empty(shape, dtype=torch.float32)

    def scores(self, chunk: Chunk, tile: Tile, q_NMD: Tensor, k_NVD: Tensor) -> Tensor:
        """scale q k^T, float32 [n, H, C, V'], where V' is V rounded up to a multiple of the tile's keys."""
        rows, queries, keys = chunk.sizes
        scores = self.empty(rows, self.heads, queries, round_up(keys, tile.keys))
        # Scale the product, not q: scaling q would round once more.
        _product(self.matrices(scores, keys), q_NMD, k_NVD.mT, scale=self.scale)
        return scores

    def compose_forward(
        self,
        step: tl.constexpr,
        chunk: Chunk,
        tile: Tile,
        x: Tensor,
        out: Tensor,
        statistics_BH2T: Tensor,
        partials: Tensor | None = None,
    ) -> None:
        """Launch the kernel for one of its steps."""
        sides = self.post if step == LOGITS_TO_COMPOSED else self.pre
        documents = self.document_ids_BS
        # A step does not access the tensors that it does not need; any tensor will do for them.
        partials = x if partials is None else partials
        tensors = [x, out, statistics_BH2T, partials, sides.by_query.weights_BHRP, sides.by_key.weights_BHRP]
        tensors.append(x if documents is None else documents)
        self.launch(compose_forward, tensors, chunk, tile, x, sides, STEP=step.value, DOCUMENTS=documents is not None)

    def compose_backward(
        self,
        post: bool,
        chunk: Chunk,
        tile: Tile,
        x: Tensor,
        gradient: Tensor,
        probabilities: Tensor,
        delta: Tensor,
        operand: Tensor,
        dweights_BHRP: Sequence[Tensor],
    ) -> None:
        """Launch the kernel, and add the gradients of the weights to ``dweights_BHRP``, by query and by key."""
        by_query, by_key = sides = self.post if post else self.pre
        rows, queries, keys = chunk.sizes
        row_stride = x.shape[3]
        tiles_along_keys, tiles_along_queries = row_stride // tile.keys, math.ceil(queries / tile.queries)
        query_partials = self.empty(rows, tiles_along_keys, self.heads, by_query.rows, queries)
        key_partials = self.empty(rows, tiles_along_queries, self.heads, by_key.rows, row_stride)
        tensors = [x, gradient, probabilities, delta, operand, query_partials, key_partials]
        tensors += [by_query.weights_BHRP, by_key.weights_BHRP]
        self.launch(compose_backward, tensors, chunk, tile, x, sides, POST=post)
        dquery_BHRT, dkey_BHRS = dweights_BHRP
        # Each query belongs to one chunk, so its sum is final; keys get gradients from many chunks.
        self.reduce_partials(query_partials, dquery_BHRT, chunk._replace(keys=chunk.queries), queries, add=False)
        self.reduce_partials(key_partials, dkey_BHRS, chunk, keys, add=True)

    def finish_statistics(self, chunk: Chunk, partials: Tensor, statistics_BH2T: Tensor) -> None:
        """Launch the kernel: the chunk's part of the statistics from partials [n, tiles along keys, H, 2, C]."""
        rows, queries, _ = chunk.sizes
        finish_statistics[(math.ceil(queries / REDUCE_BLOCK), self.heads, rows)](
            partials,
            statistics_BH2T,
            queries,
            partials.shape[1],
            chunk.blocks,
            chunk.batch.start,
            chunk.queries.start,
            self.queries,
            HEADS=self.heads,
            BLOCK=REDUCE_BLOCK,
        )

    def reduce_partials(self, partials: Tensor, sums: Tensor, chunk: Chunk, width: int, add: bool) -> None:
        """Launch the kernel: reduce partials [n, tiles, ..., positions] to sums [..., positions].

        The partials start at position ``chunk.keys.start`` of the sums, and only their first ``width`` positions count.
        """
        _, queries, _ = chunk.sizes
        # The kernel wants a block's queries to be a multiple of a program's positions; both are powers of two.
        size = REDUCE_BLOCK if chunk.blocks == 1 else min(REDUCE_BLOCK, queries)
        span = (chunk.blocks - 1) * queries + width
        lines = partials[0, 0].numel() // partials.shape[-1]
        if lines == 0:  # a side without weights
            return
        reduce_partials[(math.ceil(span / size), lines, chunk.batch.stop - chunk.batch.start)](
            partials,
            sums,
            width,
            queries,
            partials.shape[1],
            chunk.blocks,
            chunk.batch.start,
            chunk.keys.start,
            partials.shape[-1],
            sums.shape[-1],
            ADD=add,
            BLOCK=size,
        )

    def launch(
        self,
        kernel: Callable,
        tensors: Sequence[Tensor],
        chunk: Chunk,
        tile: Tile,
        x: Tensor,
        sides: Sides,
        **constants: Any,
    ) -> None:
        """Launch a compose kernel with a program for each tile of ``x`` [n, H, C, V']."""
        rows, queries, keys = chunk.sizes
        by_query, by_key = sides
        row_stride = x.shape[3]
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
            self.first_visible,
            _NO_WINDOW if self.window is None else min(self.window, _NO_WINDOW),
            HEADS=self.heads,
            QUERY_RANK=by_query.rank,
            QUERY_GATE=int(by_query.gate),
            KEY_RANK=by_key.rank,
            KEY_GATE=int(by_key.gate),
            BLOCK_T=tile.queries,
            BLOCK_S=tile.keys,
            num_warps=tile.warps,
            enable_fp_fusion=True,  # not the default in newer versions of Triton, and the kernels are mostly FMAs
            **constants,
        )

    def of_queries(self, x_BTHD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part of a tensor by query, [N, M, D]: heads that share a key/value head form one matrix."""
        return self.by_row(x_BTHD, chunk).reshape(chunk.sizes[0] * self.kv_heads, -1, self.head_dim)

    def by_row(self, x_BTHD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part of a tensor by query as [batch rows, blocks, H, C, D], a view."""
        return x_BTHD[chunk.batch, chunk.queries].unflatten(1, (chunk.blocks, -1)).transpose(2, 3)

    def store_queries(self, x_NMD: Tensor, chunk: Chunk, out_BTHD: Tensor) -> None:
        """The inverse of :meth:`of_queries`."""
        view = self.by_row(out_BTHD, chunk)
        view.copy_(x_NMD.view(view.shape))

    def heads_first(self, x_BSGD: Tensor) -> Tensor:
        """[B, G, padding + S, D], with zeros in the padding and before the first key that any query sees."""
        visible_BGSD = x_BSGD[:, self.first_visible :].transpose(1, 2)
        return F.pad(visible_BGSD, (0, 0, self.padding + self.first_visible, 0)).contiguous()

    def of_keys(self, x_BGSD: Tensor, chunk: Chunk) -> Tensor:
        """The chunk's part of a tensor by key, [N, V, D]; a copy if there are several blocks, whose keys overlap."""
        _, queries, keys = chunk.sizes
        start = self.padding + chunk.keys.start
        x_nGSD = x_BGSD[chunk.batch, :, start : start + (chunk.blocks - 1) * queries + keys]
        if chunk.blocks == 1:
            return x_nGSD.flatten(0, 1)
        # Windows of ``keys`` positions every ``queries`` positions, one for each block.
        return x_nGSD.unfold(2, keys, queries).permute(0, 2, 1, 4, 3).reshape(-1, keys, self.head_dim)

    def add_to_keys(self, x_BGSD: Tensor, a: Tensor, b: Tensor, chunk: Chunk, scale: float = 1.0) -> None:
        """Add the products scale a b [N, V, D] to the part of a tensor by key that :meth:`of_keys` selects."""
        if chunk.blocks == 1:
            _product(self.of_keys(x_BGSD, chunk), a, b, scale=scale, add=True)
            return
        _, queries, keys = chunk.sizes
        product_NVD = self.empty(a.shape[0], keys, self.head_dim)
        _product(product_NVD, a, b, scale=scale)
        product = product_NVD.view(-1, chunk.blocks, self.kv_heads, keys, self.head_dim).transpose(1, 2)
        # The keys of blocks overlap, but those ``queries`` keys apart do not: add one such slice after the other.
        for first in range(0, keys, queries):
            start = self.padding + chunk.keys.start + first
            part = x_BGSD[chunk.batch, :, start : start + chunk.blocks * queries].unflatten(2, (chunk.blocks, queries))
            part += product[:, :, :, first : first + queries]

    def matrices(self, x: Tensor, keys: int) -> Tensor:
        """[n, H, C, V'] as [N, M, V], a view without the padding past the last key."""
        return x.view(x.shape[0] * self.kv_heads, -1, x.shape[3])[:, :, :keys]


def _product(out: Tensor, a: Tensor, b: Tensor, *, scale: float = 1.0, add: bool = False) -> None:
    """out = scale a b, plus out if ``add``, as batched matrices. A float32 ``out`` of 16-bit a and b is not rounded."""
    options = {"beta": int(add), "alpha": scale, "out": out}
    if out.is_cuda and out.dtype != a.dtype:
        torch.baddbmm(out, a, b, out.dtype, **options)
    elif out.is_cuda or add or out.dtype != torch.float32:
        torch.baddbmm(out, a.to(out.dtype), b.to(out.dtype), **options)
    else:
        # Like cuBLAS, scale the result of the product. MKL's alpha scales an input, which rounds once more.
        torch.bmm(a.to(out.dtype), b.to(out.dtype), out=out).mul_(scale)
