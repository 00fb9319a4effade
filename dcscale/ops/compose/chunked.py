"""Compose and its gradient on the maps of one chunk of queries: a few batched products, the rest passes in place.

Axes in names: H heads, B batch, C queries of the chunk, N = B * C, S keys the chunk sees, R rank, P any positions.
Maps lie as [H, B, C, S]. Then the query-wise latents are one batched product over N, everything key-wise runs along
contiguous keys, and no map is ever transposed.

Compose attention in plain PyTorch, one chunk of queries after the other, with nothing of size T x S kept.

A chunk computes the scores of all heads against the keys it can see, mixes them, takes the softmax, mixes the
probabilities and applies the values. Only the inputs are saved for backward, which computes the chunk's scores and
probabilities again and follows the gradient of DCMHA (arXiv 2405.08553). The row term of the softmax's gradient is
sum_s P dP: flash attention's rowsum(dO * O) does not equal it once heads are mixed after the softmax.

Both directions are custom ops, so that torch.compile and activation checkpointing see one call, not its loop.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width; C queries of a chunk,
V keys it sees, M = H * B. The work is done in float32 (float64 for float64 input), heads first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import DIFFERENTIABLE, TENSORS, define_operator
from dcscale.ops.masks import key_range, visible_keys


class Scratch:
    """Memory that one chunk leaves to the next: fetching fresh pages would cost more than the arithmetic on them.

    ``dtype`` is the type of the work on ``like``: float32, or float64 for float64.
    """

    def __init__(self, like: Tensor):
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self._device = like.device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """An uninitialised tensor, in the memory of the one that was last taken by this name."""
        elements = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < elements:
            self._buffers[name] = torch.empty(elements, dtype=self.dtype, device=self._device)
        return self._buffers[name][:elements].view(shape)


class Latents(NamedTuple):
    """The maps without a head axis through which the heads meet; None for a side without low-rank weights."""

    query_NRS: Tensor | None
    key_RBCS: Tensor | None


class Mixer(NamedTuple):
    """:class:`ComposeWeights` with positions last: q1, q2, k1, k2 [R, H, B, P], qg, kg [H, B, P]."""

    q1_RHBP: Tensor | None
    q2_RHBP: Tensor | None
    qg_HBP: Tensor | None
    k1_RHBP: Tensor | None
    k2_RHBP: Tensor | None
    kg_HBP: Tensor | None

    @classmethod
    def of(cls, weights: Sequence[Tensor | None], work_type: torch.dtype) -> Mixer:
        """From q1, q2, qg, k1, k2, kg, batch and positions first."""
        return cls(*(None if w is None else w.to(work_type).movedim((0, 1), (-2, -1)).contiguous() for w in weights))

    def zeros_like(self) -> Mixer:
        """Zeros where this has weights."""
        return Mixer(*(None if w is None else torch.zeros_like(w) for w in self))

    def narrow(self, queries: slice, keys: slice) -> Mixer:
        """Views of the weights of these queries and keys."""
        parts = [queries] * 3 + [keys] * 3
        return Mixer(*(None if w is None else w[..., part] for w, part in zip(self, parts)))

    def batch_first(self) -> list[Tensor | None]:
        """The inverse of :meth:`of`."""
        return [None if w is None else w.movedim((-2, -1), (0, 1)) for w in self]

    def transposed(self) -> Mixer:
        """The weights of the transposed head matrices, which take gradients back through the mix."""
        return Mixer(self.q2_RHBP, self.q1_RHBP, self.qg_HBP, self.k2_RHBP, self.k1_RHBP, self.kg_HBP)

    def add_gradient(
        self, x_HBCS: Tensor, dy_HBCS: Tensor, latents: Latents, dlatents: Latents, scratch: Scratch
    ) -> None:
        """Add a chunk's part to this, the gradient of the weights with which y = mix(x).

        ``latents`` are those of that mix, ``dlatents`` those of ``mix(dy)`` with the transposed weights.
        """
        product_HBCS = scratch.take("product", x_HBCS.shape)
        if self.qg_HBP is not None or self.kg_HBP is not None:
            torch.mul(x_HBCS, dy_HBCS, out=product_HBCS)
            if self.qg_HBP is not None:
                self.qg_HBP.add_(product_HBCS.sum(3))
            if self.kg_HBP is not None:
                self.kg_HBP.add_(product_HBCS.sum(2))
        if self.q1_RHBP is not None:
            for total_RHBC, maps, latent_NRS in (
                (self.q1_RHBP, x_HBCS, dlatents.query_NRS),
                (self.q2_RHBP, dy_HBCS, latents.query_NRS),
            ):
                part_NRH = torch.bmm(latent_NRS, _by_query(maps).mT)
                total_RHBC += part_NRH.unflatten(0, x_HBCS.shape[1:3]).permute(2, 3, 0, 1)
        if self.k1_RHBP is not None:
            for total_RHBS, maps, latent_RBCS in (
                (self.k1_RHBP, x_HBCS, dlatents.key_RBCS),
                (self.k2_RHBP, dy_HBCS, latents.key_RBCS),
            ):
                for total_HBS, latent_BCS in zip(total_RHBS, latent_RBCS):
                    total_HBS += torch.mul(maps, latent_BCS, out=product_HBCS).sum(2)


def mix(x_HBCS: Tensor, weights: Mixer, scratch: Scratch, out: str, latents: str) -> tuple[Tensor, Latents]:
    """compose(x) and the latents, in the scratch's memory of the names ``out`` and ``latents``."""
    heads, batch, chunk, keys = x_HBCS.shape
    out_HBCS = scratch.take(out, x_HBCS.shape)
    if weights.kg_HBP is not None:
        torch.mul(x_HBCS, (1 + weights.kg_HBP).unsqueeze(2), out=out_HBCS)
        if weights.qg_HBP is not None:
            out_HBCS.addcmul_(x_HBCS, weights.qg_HBP.unsqueeze(3))
    elif weights.qg_HBP is not None:
        torch.mul(x_HBCS, (1 + weights.qg_HBP).unsqueeze(3), out=out_HBCS)
    else:
        out_HBCS.copy_(x_HBCS)

    latent_NRS = latent_RBCS = None
    if weights.q1_RHBP is not None:
        rank = weights.q1_RHBP.shape[0]
        latent_NRS = scratch.take(f"{latents}, by query", (batch * chunk, rank, keys))
        # Contiguous, because bmm copies other matrices one by one.
        q1_NRH = weights.q1_RHBP.permute(2, 3, 0, 1).reshape(batch * chunk, rank, heads).contiguous()
        torch.bmm(q1_NRH, _by_query(x_HBCS), out=latent_NRS)
        for latent_NS, q2_HBC in zip(latent_NRS.unbind(1), weights.q2_RHBP):
            out_HBCS.addcmul_(latent_NS.unflatten(0, (batch, chunk)), q2_HBC.unsqueeze(3))
    if weights.k1_RHBP is not None:
        rank = weights.k1_RHBP.shape[0]
        latent_RBCS = scratch.take(f"{latents}, by key", (rank, batch, chunk, keys))
        latent_RBCS.zero_()
        for x_BCS, k1_RBS in zip(x_HBCS, weights.k1_RHBP.unbind(1)):
            latent_RBCS.addcmul_(x_BCS, k1_RBS.unsqueeze(2))
        for latent_BCS, k2_HBS in zip(latent_RBCS, weights.k2_RHBP):
            out_HBCS.addcmul_(latent_BCS, k2_HBS.unsqueeze(2))
    return out_HBCS, Latents(latent_NRS, latent_RBCS)


def _by_query(maps_HBCS: Tensor) -> Tensor:
    """The same maps as [N, H, S], a view."""
    return maps_HBCS.flatten(1, 2).transpose(0, 1)


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
