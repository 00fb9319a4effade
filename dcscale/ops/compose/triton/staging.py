"""Compose attention on a GPU, chunk by chunk over the queries: the launches of the kernels, and their memory.

Forward, for each chunk, in place in one map::

    scores   = scale log2(e) q k^T                multiply_rows
    logits   = compose_pre(scores), masked        compose_scores, finish_log_sums
    composed = compose_post(exp2(logits - log_sum))            compose_probabilities
    out      = composed v                         multiply_map

Backward recomputes scores and, with the saved log-sums, probabilities and the latents of pre, then::

    dcomposed = dout v^T                          multiply_rows
    dprobabilities, composed, delta, dpost        compose_probabilities_backward, sum_by_query, sum_by_key
    dv       += composed^T dout                   multiply_transposed_map
    dscores, dpre                                 compose_scores_backward, sum_by_query, sum_by_key
    dq        = scale dscores k                   multiply_map
    dk       += scale dscores^T q                 multiply_transposed_map

Maps of 16-bit input are staged in 16 bits: scores and logits in float16, where an error of 2^-11 of log2(e) times a
score is less than what bfloat16 probabilities lose; probabilities in float16; composed and the gradients, whose range
is unknown, in the dtype of the input, as plain PyTorch rounds them. float32 input is staged in float32.

Axes in names: B batch, T queries, S keys, P positions of either, H query heads, G key/value heads, D head width. How
maps and packed weights are laid out: common.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from dcscale.ops.compose.custom_op import Call, Gradients
from dcscale.ops.compose.triton import backward, forward, products, sums
from dcscale.ops.compose.triton.packing import Frame, Sides, pack, unpack
from dcscale.ops.compose.triton.tiles import (
    UNLIMITED,
    Chunk,
    Launch,
    Launcher,
    ScratchSizes,
    Shape,
    Tile,
    Tiles,
    log_sums_shape,
    round_up,
    tiles_for,
)
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import band, key_range

LOG2_E = math.log2(math.e)
SUM_BLOCK = 256
"""Elements per program of the kernels that add partial sums."""
MOST_ROWS = 65535
"""Rows of a chunk: the largest third dimension of a grid in CUDA."""
PROGRAM_KEYS = 1024
"""Of a program that makes scores: it reads its queries once for all of them."""
STAGES = 3
"""Tiles that products and sums load ahead."""


class Kept(NamedTuple):
    """What backward needs of a chunk's forward pass."""

    scores: Tensor
    probabilities: Tensor
    latents: Tensor


class Sums(NamedTuple):
    """Gradients that the chunks fill in: of q, k and v in their layout, of the weights packed, in blocks of a tile."""

    q_BTHD: Tensor
    k_BSGD: Tensor
    v_BSGD: Tensor
    k_so_far: Tensor
    """float32 [batch rows of a chunk, positions of all blocks of keys, G, D]: incomplete sums, if there are several
    chunks. Not part of scratch."""
    v_so_far: Tensor
    by_query: dict[str, Tensor]
    """Of pre and post."""
    by_key: dict[str, Tensor]


class StagedAttention:
    """One call, with its weights as the kernels want them.

    Args:
        call: checked arguments.
        tiles: of the kernels; by default those for the GPU.
        launch: what to do with each launch, in order.
    """

    def __init__(self, call: Call, tiles: Tiles | None = None, launch: Launcher = Launch.run):
        self.all_keys, (self.first_key, call) = call.k.shape[1], _seen_keys_only(call)
        self.call, self.launch = call, launch
        self.batch, self.queries, self.heads, self.head_dim = call.q.shape
        self.keys, self.kv_heads = call.k.shape[1:3]
        ranks = [0 if w is None or w.dim() == 3 else w.shape[2] for w in (*call.pre, *call.post)]
        self.tiles = tiles or tiles_for(_capability(call.q), max(ranks), call.q.element_size())
        behind, ahead = band(call.window, call.causal)
        self.shape = Shape(self.batch, self.queries, self.keys, call.query_offset, behind, ahead)
        self.sizes = ScratchSizes(self.heads, call.q.element_size(), (ranks[0], ranks[6]), (ranks[3], ranks[9]))
        self.forward_chunks = self.chunks(self.sizes.forward)
        self.backward_chunks = self.chunks(self.sizes.backward)

        # Both directions cut the same range of keys, and of queries, so their blocks are the same.
        block_queries, block_keys = self.tiles.block
        origin = min(chunk.first_key for chunk in self.forward_chunks)
        end = max(chunk.first_key + chunk.keys for chunk in self.forward_chunks)
        self.query_frame = Frame(0, round_up(self.queries, self.tiles.product.queries), block_queries)
        self.key_frame = Frame(origin, end - origin, block_keys)
        self.document_ids = None if call.document_ids is None else call.document_ids.contiguous()
        self.q, self.k, self.v = (_rows(x) for x in (call.q, call.k, call.v))
        self.staged_dtype = torch.float32 if call.q.dtype == torch.float32 else torch.float16

    def chunks(self, scratch: Callable[[Chunk, Tiles], int]) -> list[Chunk]:
        """The chunks of a direction, whose scratch fits the budget."""

        def fits(chunk: Chunk) -> bool:
            return scratch(chunk, self.tiles) <= self.call.scratch_bytes and chunk.rows <= MOST_ROWS

        return self.shape.chunks(self.tiles.product, fits)

    @cached_property
    def pre(self) -> Sides:
        """The weights of pre, packed when they are first needed."""
        return self._pack(self.call.pre)

    @cached_property
    def post(self) -> Sides:
        """The weights of post."""
        return self._pack(self.call.post)

    def _pack(self, w: ComposeWeights) -> Sides:
        of_query, of_key = self._weights_like
        return Sides(
            pack((w.q1, w.q2, w.qg), of_query, self.query_frame, True, self.launch),
            pack((w.k1, w.k2, w.kg), of_key, self.key_frame, False, self.launch),
        )

    @property
    def _weights_like(self) -> tuple[Tensor, Tensor]:
        """Empty tensors [B, P, 0, H] by query and by key."""
        q = self.call.q
        return tuple(q.new_empty(self.batch, size, 0, self.heads) for size in (self.queries, self.keys))

    @property
    def keeps(self) -> bool:
        """Whether scratch memory can hold what backward needs of all chunks, and what else it needs for one at a time.

        The chunks are the same either way: dk and dv are added up over them, and other chunks would give other bits.
        """
        kept = [self.sizes.kept(chunk) for chunk in self.backward_chunks]
        others = (
            self.sizes.backward(chunk, self.tiles) - of_chunk for chunk, of_chunk in zip(self.backward_chunks, kept)
        )
        return sum(kept) + max(others) <= self.call.scratch_bytes

    def forward(self, kept: list[Kept] | None = None) -> tuple[Tensor, Tensor]:
        """The output [B, T, H, D], and log_sums, float32 [B, blocks, H, block].

        Fills ``kept`` if it is given; the bits of the results are the same.
        """
        out_BTHD = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        log_sums = self.empty(*log_sums_shape(self.batch, self.queries, self.heads, self.tiles))
        for chunk in self.forward_chunks if kept is None else self.backward_chunks:
            of_chunk = self.forward_chunk(chunk, out_BTHD, log_sums, keep=kept is not None)
            if kept is not None:
                kept.append(of_chunk)
        return out_BTHD, log_sums

    def forward_chunk(self, chunk: Chunk, out_BTHD: Tensor, log_sums: Tensor, keep: bool) -> Kept | None:
        """Write the chunk's part of both results."""
        scores = self.scores(chunk)
        # Logits and composed probabilities take the memory of the scores, unless these are kept.
        logits = torch.empty_like(scores) if keep else scores
        kept = Kept(scores, torch.empty_like(scores), self.latents(chunk)) if keep else None
        self.compose_scores(chunk, scores, logits, log_sums, kept and kept.latents, probabilities=False)
        composed = logits.view(self.q.dtype)
        tensors = {"logits_ptr": logits, "composed_ptr": composed, "log_sums_ptr": log_sums}
        tensors["probabilities_ptr"] = kept.probabilities if keep else logits
        kernel, tile = forward.compose_probabilities, self.tiles.forward
        self._mix(kernel, chunk, tile, self.post, tensors, KEEP_PROBABILITIES=keep)
        self.multiply_map("out", chunk, tile, composed, self.v, out_BTHD, 1.0)
        return kept

    def backward(self, dout_BTHD: Tensor, log_sums: Tensor, kept: Sequence[Kept] = ()) -> Gradients:
        """The gradients of the call. ``kept``, which is overwritten, is from :meth:`forward`; else it is made again."""
        total, dout_BTHD = self._empty_sums(), _rows(dout_BTHD)
        for i, chunk in enumerate(self.backward_chunks):
            self.backward_chunk(i, chunk, dout_BTHD, kept[i] if kept else self.recompute(chunk, log_sums), total)
        of_query, of_key = self._weights_like
        gradients = []
        # The scores that pre's kernel sees are in units of log2(e).
        for name, sides, scale in (("pre", self.pre, 1 / LOG2_E), ("post", self.post, 1.0)):
            by_query = unpack(sides.by_query, total.by_query[name], of_query, scale, self.launch)
            by_key = unpack(sides.by_key, total.by_key[name], of_key, scale, self.launch)
            gradients.append(ComposeWeights(*by_query, *by_key))
        found = Gradients(total.q_BTHD, total.k_BSGD, total.v_BSGD, *gradients)
        if self.keys == self.all_keys:
            return found
        pre, post = (ComposeWeights(*w[:3], *map(self._with_unseen_keys, w[3:])) for w in (found.pre, found.post))
        return Gradients(found.q, self._with_unseen_keys(found.k), self._with_unseen_keys(found.v), pre, post)

    def _with_unseen_keys(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient with zeros for the keys that no query sees."""
        if gradient is None:
            return None
        batch, keys, *rest = gradient.shape
        whole = gradient.new_zeros(batch, self.all_keys, *rest)
        whole[:, self.first_key : self.first_key + keys] = gradient
        return whole

    def recompute(self, chunk: Chunk, log_sums: Tensor) -> Kept:
        """What forward may keep."""
        scores, latents = self.scores(chunk), self.latents(chunk)
        probabilities = torch.empty_like(scores)
        self.compose_scores(chunk, scores, probabilities, log_sums, latents, probabilities=True)
        return Kept(scores, probabilities, latents)

    def backward_chunk(self, index: int, chunk: Chunk, dout_BTHD: Tensor, kept: Kept, total: Sums) -> None:
        """Write the chunk's part of q's gradient, and add to the others."""
        scores, probabilities, latents = kept
        gradient, composed = (torch.empty_like(scores, dtype=self.q.dtype) for _ in range(2))
        # dP' = dout v^T; the kernel replaces it by dP
        self.multiply_rows("dcomposed", chunk, self.tiles.backward, dout_BTHD, self.v, gradient, 1.0)
        tensors = {"probabilities_ptr": probabilities, "gradient_ptr": gradient}
        self._mix_backward(
            "post", backward.compose_probabilities_backward, chunk, {**tensors, "composed_ptr": composed}, total
        )
        # dv += P'^T dout
        self.multiply_transposed_map("dv", index, chunk, composed, dout_BTHD, total.v_so_far, total.v_BSGD, 1.0)
        del composed
        # dS = compose_pre^T(P (dP - delta)), in the memory of the scores
        dscores = scores.view(self.q.dtype)
        tensors |= {"scores_ptr": scores, "dscores_ptr": dscores, "latents_ptr": latents}
        tensors |= {"query_sums_ptr": total.by_query["post"]}
        self._mix_backward(
            "pre",
            backward.compose_scores_backward,
            chunk,
            tensors,
            total,
            POST_QUERY_RANK=self.post.by_query.rank,
        )
        scale = self.call.scale
        self.multiply_map("dq", chunk, self.tiles.backward, dscores, self.k, total.q_BTHD, scale)
        self.multiply_transposed_map("dk", index, chunk, dscores, self.q, total.k_so_far, total.k_BSGD, scale)

    def _empty_sums(self) -> Sums:
        """Packed gradients by key are added up, so they start as zeros."""
        dk, dv = self.k.new_empty(self.k.shape), self.k.new_empty(self.k.shape)
        several = any(chunk.first_batch == 0 for chunk in self.backward_chunks[1:])
        batch_rows = self.backward_chunks[0].batch_rows
        so_far = (batch_rows, self.key_frame.positions if several else 0, self.kv_heads, self.head_dim)
        tile, by_query, by_key = self.tiles.backward.queries, {}, {}
        for name, sides, more in (("pre", self.pre, 0), ("post", self.post, 1)):
            _, blocks, _, rows, _ = sides.by_query.weights.shape
            blocks *= self.query_frame.block // tile
            by_query[name] = self.empty(self.batch, blocks, self.heads, rows + more, tile)
            by_key[name] = torch.zeros_like(sides.by_key.weights)
        dq = torch.empty_like(self.q, memory_format=torch.contiguous_format)
        return Sums(dq, dk, dv, self.empty(*so_far), self.empty(*so_far), by_query, by_key)

    def empty(self, *shape: int) -> Tensor:
        """Uninitialized float32 memory."""
        return self.q.new_empty(shape, dtype=torch.float32)

    def map(self, chunk: Chunk, heads: int, dtype: torch.dtype) -> Tensor:
        """An uninitialized map."""
        block_queries, block_keys = self.tiles.block
        blocks = (chunk.row_queries // block_queries, chunk.row_keys // block_keys)
        return self.q.new_empty((chunk.rows, *blocks, heads, block_queries, block_keys), dtype=dtype)

    def latents(self, chunk: Chunk) -> Tensor:
        """An uninitialized map of the latents of pre."""
        return self.map(chunk, self.pre.by_query.rank + self.pre.by_key.rank, torch.float32)

    def scores(self, chunk: Chunk) -> Tensor:
        """The scores in units of log2(e)."""
        scores = self.map(chunk, self.heads, self.staged_dtype)
        scale, limit = self.call.scale * LOG2_E, torch.finfo(self.staged_dtype).max
        self.multiply_rows("scores", chunk, self.tiles.forward, self.q, self.k, scores, scale, limit)
        return scores

    def compose_scores(
        self, chunk: Chunk, scores: Tensor, out: Tensor, log_sums: Tensor, latents: Tensor | None, probabilities: bool
    ) -> None:
        """Logits and their log-sums or, with the known log-sums, probabilities."""
        tile = self.tiles.forward
        tiles = chunk.scores // (tile.queries * tile.keys)
        partials = scores if probabilities else self.empty(tiles, self.heads, 2, tile.queries)
        tensors = {
            "scores_ptr": scores,
            "out_ptr": out,
            "latents_ptr": scores if latents is None else latents,
            "partials_ptr": partials,
            "log_sums_ptr": log_sums,
            "documents_ptr": scores if self.document_ids is None else self.document_ids,
        }
        constants = {"PROBABILITIES": probabilities, "KEEP_LATENTS": latents is not None}
        constants["DOCUMENTS"] = self.document_ids is not None
        self._mix(forward.compose_scores, chunk, tile, self.pre, tensors, **constants)
        if not probabilities:
            grid = (self.heads, chunk.row_queries // tile.queries, chunk.rows)
            tensors = {"partials_ptr": partials, "log_sums_ptr": log_sums}
            warps = max(1, tile.queries // 32)
            self._run(sums.finish_log_sums, grid, chunk, tile, tensors, warps=warps, stages=STAGES)

    def _mix(
        self, kernel: Any, chunk: Chunk, tile: Tile, sides: Sides, tensors: dict[str, Tensor], **constants: Any
    ) -> None:
        """Launch a kernel with a program for each tile."""
        grid = (chunk.row_keys // tile.keys, chunk.row_queries // tile.queries, chunk.rows)
        by_query, by_key = sides
        tensors = {**tensors, "query_weights_ptr": by_query.weights, "key_weights_ptr": by_key.weights}
        self._run(kernel, grid, chunk, tile, tensors, **sides.constants, **constants)

    def _mix_backward(
        self, stage: str, kernel: Any, chunk: Chunk, tensors: dict[str, Tensor], total: Sums, **constants: Any
    ) -> None:
        """Launch the kernel of a stage, and those that add up the gradients of its weights."""
        tile, sides = self.tiles.backward, getattr(self, stage)
        tiles = chunk.scores // (tile.queries * tile.keys)
        by_query, by_key = total.by_query[stage], total.by_key[stage]
        query_partials = self.empty(tiles, *by_query.shape[2:])
        key_partials = self.empty(tiles, *by_key.shape[2:])
        partials = {"query_partials_ptr": query_partials, "key_partials_ptr": key_partials}
        self._mix(kernel, chunk, tile, sides, {**tensors, **partials}, **constants)
        for reduce, partials, of_stage, programs in (
            (sums.sum_by_query, query_partials, by_query, (chunk.row_queries // tile.queries, chunk.rows)),
            (sums.sum_by_key, key_partials, by_key, (chunk.keys // tile.keys, chunk.batch_rows)),
        ):
            line = partials[0].numel()
            if line > 0:  # there are weights by key
                block = min(SUM_BLOCK, triton.next_power_of_2(line))
                grid = (programs[0], triton.cdiv(line, block), programs[1])
                tensors = {"partials_ptr": partials, "sums_ptr": of_stage}
                self._run(reduce, grid, chunk, tile, tensors, stages=STAGES, LINE=line, BLOCK=block)

    def multiply_rows(
        self,
        name: str,
        chunk: Chunk,
        tile: Tile,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        scale: float,
        limit: float = math.inf,
    ) -> None:
        """The map scale a b^T within +-limit, for kernels with this tile."""
        product = self.tiles.product
        programs = triton.cdiv(chunk.row_keys, PROGRAM_KEYS)
        grid = (chunk.row_queries // product.queries * programs, self.heads, chunk.rows)
        tensors = {"a_ptr": a, "b_ptr": b, "map_ptr": out}
        # Wider heads in parts: all of one would not leave enough registers and shared memory.
        block = self._columns(self.tiles.columns if self.head_dim <= self.tiles.columns else self.tiles.columns // 2)
        numbers = {"scale": scale, "limit": limit}
        stages = self.tiles.score_stages
        self._multiply(name, products.multiply_rows, grid, chunk, tile, tensors, block, stages, **numbers)

    def multiply_map(
        self, name: str, chunk: Chunk, tile: Tile, map_: Tensor, b: Tensor, out: Tensor, scale: float
    ) -> None:
        """The chunk's part of scale map b, by query, for a map from kernels with this tile."""
        block = self._columns(self.tiles.columns)
        parts = triton.cdiv(self.head_dim, block)
        grid = (chunk.row_queries // self.tiles.product.queries * parts, self.heads, chunk.rows)
        tensors = {"map_ptr": map_, "b_ptr": b, "out_ptr": out}
        self._multiply(name, products.multiply_map, grid, chunk, tile, tensors, block, STAGES, scale=scale)

    def multiply_transposed_map(
        self, name: str, index: int, chunk: Chunk, map_: Tensor, a: Tensor, so_far: Tensor, out: Tensor, scale: float
    ) -> None:
        """Add scale map^T a, by key, for the chunk at this index of the list."""
        tile = self.tiles.product
        block = self._columns(self.tiles.columns)
        grid = (chunk.keys // tile.keys * triton.cdiv(self.head_dim, block), self.kv_heads, chunk.batch_rows)
        origin, before = self.key_frame.origin, self.backward_chunks[index - 1] if index else None
        final_from = self.shape.complete_from(chunk, origin, tile.keys)
        add_from = add_below = 0
        if before is not None and before.first_batch == chunk.first_batch:
            # What the chunk before, of later queries, saw and could not complete.
            add_from, add_below = before.first_key - origin, self.shape.complete_from(before, origin, tile.keys)
        tensors = {"map_ptr": map_, "a_ptr": a, "sums_ptr": so_far, "out_ptr": out}
        numbers = {"scale": scale, "add_from": add_from, "add_below": add_below, "final_from": final_from}
        numbers["sums_keys"] = so_far.shape[1]
        kernel, mixed = products.multiply_transposed_map, self.tiles.backward
        self._multiply(name, kernel, grid, chunk, mixed, tensors, block, STAGES, **numbers)

    def _columns(self, most: int) -> int:
        """Columns of heads that a program works on: a power of two, at least the 16 of a ``tl.dot``."""
        return min(most, max(16, triton.next_power_of_2(self.head_dim)))

    def _multiply(
        self,
        name: str,
        kernel: Any,
        grid: tuple[int, int, int],
        chunk: Chunk,
        tile: Tile,
        tensors: dict[str, Tensor],
        block: int,
        stages: int,
        **numbers: float,
    ) -> None:
        arguments = {**tensors, **numbers}
        for letter in ("a", "b"):
            if f"{letter}_ptr" in tensors:
                arguments |= _strides(letter, tensors[f"{letter}_ptr"])
        warps = self.tiles.product.warps
        self._run(kernel, grid, chunk, tile, arguments, name=name, warps=warps, stages=stages, BLOCK_D=block)

    def _run(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        chunk: Chunk,
        tile: Tile,
        arguments: dict[str, Any],
        *,
        name: str | None = None,
        warps: int | None = None,
        stages: int = 1,
        **constants: Any,
    ) -> None:
        """Complete a launch by what its kernel asks for, and launch it."""
        behind, ahead = (UNLIMITED if x is None else min(x, UNLIMITED) for x in (self.shape.behind, self.shape.ahead))
        geometry = {
            "queries": self.queries,
            "keys": self.keys,
            "first_batch": chunk.first_batch,
            "blocks": chunk.blocks,
            "first_query": chunk.first_query,
            "first_key": chunk.first_key,
            "key_origin": self.key_frame.origin,
            "shift": self.call.query_offset + chunk.first_query - chunk.first_key,
            "behind": behind,
            "ahead": ahead,
            "row_queries": chunk.row_queries,
            "row_keys": chunk.row_keys,
            "query_blocks": self.query_frame.blocks,
            "key_blocks": self.key_frame.blocks,
        }
        block_queries, block_keys = self.tiles.block
        product = self.tiles.product
        coarse = {"COARSE_T": product.queries, "COARSE_S": product.keys, "TILES": PROGRAM_KEYS // product.keys}
        blocks = {"BLOCK_Q": block_queries, "BLOCK_T": tile.queries, "BLOCK_S": block_keys}
        heads = {"HEADS": self.heads, "GROUP": self.heads // self.kv_heads, "HEAD_DIM": self.head_dim}
        takes = set(kernel.arg_names)
        arguments = {**arguments, **{name: x for name, x in geometry.items() if name in takes}}
        constants |= {name: x for name, x in {**heads, **blocks, **coarse}.items() if name in takes}
        self.launch(
            Launch(name or kernel.__name__, kernel, grid, arguments, constants, warps or tile.warps, stages, chunk)
        )


def _strides(name: str, x: Tensor) -> dict[str, int]:
    """Arguments of a kernel that tell where the rows of a tensor are."""
    batch, position, head, _ = x.stride()
    return {f"{name}_batch_stride": batch, f"{name}_stride": position, f"{name}_head_stride": head}


def _rows(x: Tensor) -> Tensor:
    """The tensor, or a copy if the elements of a head are not contiguous."""
    return x if x.stride(3) == 1 else x.contiguous()


def _capability(q: Tensor) -> int:
    """10 * major + minor. On a CPU the kernels are interpreted, and any tile works."""
    major, minor = torch.cuda.get_device_capability(q.device) if q.is_cuda else (9, 0)
    return 10 * major + minor


def _seen_keys_only(call: Call) -> tuple[int, Call]:
    """The first key that some query sees, and the call with only the keys from there to the last such key."""
    last_query = call.query_offset + call.q.shape[1] - 1
    start, stop = key_range(call.query_offset, last_query, call.window, call.causal, call.k.shape[1])

    def seen(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, start:stop]

    pre, post = (ComposeWeights(*w[:3], *map(seen, w[3:])) for w in (call.pre, call.post))
    tensors = {"k": seen(call.k), "v": seen(call.v), "document_ids": seen(call.document_ids), "pre": pre, "post": post}
    return start, call._replace(**tensors, query_offset=call.query_offset - start)
