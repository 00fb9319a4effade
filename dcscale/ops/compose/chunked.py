"""Compose attention in plain PyTorch, one chunk of queries after the other, with nothing of size T x S kept.

A chunk computes the scores of all heads against the keys it can see, mixes them, takes the softmax, mixes the
probabilities and applies the values. Only the inputs are saved for backward, which computes the chunk's scores and
probabilities again and follows the gradient of DCMHA (arXiv 2405.08553). The row term of the softmax's gradient is
sum_s P dP: flash attention's rowsum(dO * O) does not equal it once heads are mixed after the softmax.

Both directions are custom ops, so that torch.compile and activation checkpointing see one call, not its loop.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width; C queries of a chunk,
V keys it sees, M = H * B. The work is done in float32 (float64 for float64 input), heads first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from dcscale.ops.compose.mixing import Latents, Mixer, Scratch, mix
from dcscale.ops.compose.operator import DIFFERENTIABLE, TENSORS, define_operator
from dcscale.ops.visibility import key_range, visible_keys

MAX_CHUNK_QUERIES = 64
"""Queries a chunk. More make better matrix products, fewer waste less on keys that only some of the queries see."""
MAX_MAP_ELEMENTS = 2**20
"""Elements H * B * C * V of a map, so that maps stay in the cache, or what the budget of scratch allows, if that is
less. Batch rows, then the queries of a chunk, are made fewer until a map fits (at least one of each). Scratch is 3 maps
forward and 5 backward, plus the latents: 2R/H of a map for each mix, 2 forward and 3 backward."""


def _forward(*arguments: Any) -> list[Tensor]:
    out_BTHD = torch.empty_like(arguments[0], memory_format=torch.contiguous_format)
    for rows, part in _parts(*arguments):
        out_BTHD[rows] = part.forward()
    return [out_BTHD]


def _backward(dout_BTHD: Tensor, _: list[Tensor], *arguments: Any) -> list[Tensor | None]:
    gradients = [
        None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in arguments[:DIFFERENTIABLE]
    ]
    for rows, part in _parts(*arguments):
        for whole, gradient in zip(gradients, part.backward(dout_BTHD[rows])):
            if whole is not None:
                whole[rows] = gradient
    return gradients


def _parts(*arguments: Any) -> Iterator[tuple[slice, _Part]]:
    """As many batch rows at once as fit into a map."""
    batch, queries, heads, _ = arguments[0].shape
    window, _, query_offset, scratch_bytes = arguments[TENSORS:]
    chunk = min(queries, MAX_CHUNK_QUERIES)
    start, end = key_range(query_offset + queries - chunk, query_offset + queries - 1, window)
    scratch = Scratch(arguments[0])
    rank = max((x.shape[2] for x in arguments[3:DIFFERENTIABLE] if x is not None and x.dim() == 4), default=0)
    budget = int(scratch_bytes / scratch.dtype.itemsize / (5 + 3 * 2 * rank / heads))
    map_elements = min(MAX_MAP_ELEMENTS, budget)
    size = max(1, map_elements // (heads * chunk * (end - start)))
    for first in range(0, batch, size):
        rows = slice(first, first + size)
        tensors = [x if x is None else x[rows] for x in arguments[:TENSORS]]
        yield rows, _Part(scratch, map_elements, *tensors, *arguments[TENSORS:-1])


class _Part:
    """Some batch rows of a call, laid out for the chunks."""

    def __init__(
        self, scratch: Scratch, map_elements: int, q_BTHD: Tensor, k_BSGD: Tensor, v_BSGD: Tensor, *others: Any
    ):
        *weights, self.document_ids_BS, self.window, self.scale, self.query_offset = others
        self.scratch, self.map_elements = scratch, map_elements
        self.group = q_BTHD.shape[2] // k_BSGD.shape[2]
        self.q_HBTD = self.heads_first(q_BTHD)
        self.k_HBSD, self.v_HBSD = (self.heads_first(x).repeat_interleave(self.group, 0) for x in (k_BSGD, v_BSGD))
        self.pre, self.post = (Mixer.of(stage, scratch.dtype) for stage in (weights[:6], weights[6:]))

    def forward(self) -> Tensor:
        """The output [B, T, H, D]."""
        out_HBTD = torch.empty_like(self.q_HBTD)
        for queries, keys in self.chunks():
            _, probabilities_HBCV, _ = self.probabilities(queries, keys)
            post = self.post.narrow(queries, keys)
            composed_HBCV, _ = mix(probabilities_HBCV, post, self.scratch, "mixed", "post latents")
            out_MCD = torch.bmm(composed_HBCV.flatten(0, 1), _positions(self.v_HBSD, keys))
            _positions(out_HBTD, queries).copy_(out_MCD)
        return out_HBTD.permute(1, 2, 0, 3)

    def backward(self, dout_BTHD: Tensor) -> list[Tensor | None]:
        """The gradients of q, k, v and the twelve weights, shaped as those."""
        scratch = self.scratch
        dout_HBTD = self.heads_first(dout_BTHD)
        dq_HBTD, dk_HBSD, dv_HBSD = (torch.zeros_like(x) for x in (self.q_HBTD, self.k_HBSD, self.v_HBSD))
        dpre, dpost = self.pre.zeros_like(), self.post.zeros_like()
        for queries, keys in self.chunks():
            q_MCD, k_MVD, v_MVD = (
                _positions(x, part) for x, part in ((self.q_HBTD, queries), (self.k_HBSD, keys), (self.v_HBSD, keys))
            )
            dout_MCD = _positions(dout_HBTD, queries)
            pre, post = self.pre.narrow(queries, keys), self.post.narrow(queries, keys)
            scores, probabilities, pre_latents = self.probabilities(queries, keys)

            composed, post_latents = mix(probabilities, post, scratch, "mixed", "post latents")
            _positions(dv_HBSD, keys).baddbmm_(composed.flatten(0, 1).mT, dout_MCD)
            dcomposed = scratch.take("gradient", scores.shape)
            torch.bmm(dout_MCD, v_MVD.mT, out=dcomposed.flatten(0, 1))
            dprobabilities, dlatents = mix(dcomposed, post.transposed(), scratch, "mixed", "gradient latents")
            dpost.narrow(queries, keys).add_gradient(probabilities, dcomposed, post_latents, dlatents, scratch)

            product = torch.mul(probabilities, dprobabilities, out=scratch.take("product", scores.shape))
            dmixed = dprobabilities.sub_(product.sum(-1, keepdim=True)).mul_(probabilities)
            dscores, dlatents = mix(dmixed, pre.transposed(), scratch, "gradient", "gradient latents")
            dpre.narrow(queries, keys).add_gradient(scores, dmixed, pre_latents, dlatents, scratch)
            _positions(dq_HBTD, queries).baddbmm_(dscores.flatten(0, 1), k_MVD, alpha=self.scale)
            _positions(dk_HBSD, keys).baddbmm_(dscores.flatten(0, 1).mT, q_MCD, alpha=self.scale)
        dk_GBSD, dv_GBSD = (x.unflatten(0, (-1, self.group)).sum(1) for x in (dk_HBSD, dv_HBSD))
        dq_dk_dv = [x.permute(1, 2, 0, 3) for x in (dq_HBTD, dk_GBSD, dv_GBSD)]
        return dq_dk_dv + dpre.batch_first() + dpost.batch_first()

    def heads_first(self, x_BTHD: Tensor) -> Tensor:
        """A copy [H, B, T, D] in the type of the work."""
        return x_BTHD.to(self.scratch.dtype).permute(2, 0, 1, 3).contiguous()

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """Queries and the keys they see, chunk by chunk."""
        heads, batch, queries, _ = self.q_HBTD.shape
        start = 0
        while start < queries:
            size = MAX_CHUNK_QUERIES
            while True:
                end = min(start + size, queries)
                keys = slice(*key_range(self.query_offset + start, self.query_offset + end - 1, self.window))
                if size == 1 or heads * batch * (end - start) * (keys.stop - keys.start) <= self.map_elements:
                    break
                size //= 2
            yield slice(start, end), keys
            start = end

    def probabilities(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Latents]:
        """Scores and probabilities [H, B, C, V], in the scratch by these names, and the latents of pre."""
        q_MCD, k_MVD = _positions(self.q_HBTD, queries), _positions(self.k_HBSD, keys)
        scores_HBCV = self.scratch.take("scores", (*self.q_HBTD.shape[:2], q_MCD.shape[1], k_MVD.shape[1]))
        # The scale belongs to the product: on q it would be one rounding more. beta=0 ignores what scores holds.
        scores_HBCV.flatten(0, 1).baddbmm_(q_MCD, k_MVD.mT, beta=0, alpha=self.scale)
        pre = self.pre.narrow(queries, keys)
        mixed_HBCV, latents = mix(scores_HBCV, pre, self.scratch, "mixed", "pre latents")
        seen = visible_keys(
            range(self.query_offset + queries.start, self.query_offset + queries.stop),
            range(keys.start, keys.stop),
            self.window,
            self.document_ids_BS,
            mixed_HBCV.device,
        )
        if seen is not None:
            # Adding one mask to the maps of all heads is ten times as fast as masked_fill_ on them.
            mixed_HBCV += mixed_HBCV.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        probabilities_HBCV = self.scratch.take("probabilities", mixed_HBCV.shape)
        return scores_HBCV, torch.softmax(mixed_HBCV, -1, out=probabilities_HBCV), latents


def _positions(x_HBTD: Tensor, part: slice) -> Tensor:
    """These positions as [M, C, D], a view."""
    return x_HBTD[:, :, part].flatten(0, 1)


chunked_attention = define_operator("compose_chunked", _forward, _backward)
