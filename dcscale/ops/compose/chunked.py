"""Compose attention in plain PyTorch, chunk by chunk over the queries, keeping nothing of size T x S.

For each chunk: the scores of all heads against the keys it can see, compose, softmax, compose, times the values. Only
the inputs are saved for backward, which recomputes a chunk's scores and probabilities and then follows the gradient of
DCMHA (arXiv 2405.08553).

Scores and probabilities of a chunk have the layout [H, B, C, V]: the latents by query are then one batched product,
everything by key runs along contiguous keys, and nothing of that size is ever transposed. Most passes work in place in
reused buffers (:class:`Scratch`).

Axes in names: B batch, T queries, S keys, R rank, H query heads, G key/value heads, D head width; C queries of a chunk,
V keys it sees, N = B * C, M = H * B, P any positions. The work is done in float32 (float64 for float64 input).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import Call, Gradients, define_operator
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.masks import key_range, most_keys, visible_keys

MAX_CHUNK_QUERIES = 64
"""Queries of a chunk. More make the matrix products more efficient; fewer waste less work on keys that only some of the
chunk's queries see."""
MAX_SCORE_ELEMENTS = 2**20
"""Limit of H * B * C * V, the elements of a chunk's scores, so that they stay in the CPU's cache. ``scratch_bytes`` may
lower it further. To meet it, batch rows and then queries of a chunk are reduced (to at least one of each)."""


class Scratch:
    """Buffers that chunks reuse: page-faulting in fresh memory would cost more than the arithmetic on it.

    ``dtype`` is the dtype of the computation: float32, or float64 for float64 input.
    """

    def __init__(self, like: Tensor):
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        self._device = like.device
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, shape: Sequence[int]) -> Tensor:
        """An uninitialized tensor. It overlaps the one that was last taken by this name."""
        elements = math.prod(shape)
        if name not in self._buffers or self._buffers[name].numel() < elements:
            self._buffers[name] = torch.empty(elements, dtype=self.dtype, device=self._device)
        return self._buffers[name][:elements].view(shape)


class Latents(NamedTuple):
    """The sums over heads inside the low-rank terms; None for a side without low-rank weights."""

    query_NRV: Tensor | None
    key_RBCV: Tensor | None


class ChunkWeights(NamedTuple):
    """:class:`ComposeWeights` with positions last: q1, q2, k1, k2 [R, H, B, P], qg, kg [H, B, P]."""

    q1_RHBP: Tensor | None
    q2_RHBP: Tensor | None
    qg_HBP: Tensor | None
    k1_RHBP: Tensor | None
    k2_RHBP: Tensor | None
    kg_HBP: Tensor | None

    @classmethod
    def of(cls, weights: ComposeWeights, dtype: torch.dtype) -> ChunkWeights:
        """A contiguous copy in this layout and dtype."""
        return cls(*(None if w is None else w.to(dtype).movedim((0, 1), (-2, -1)).contiguous() for w in weights))

    def zeros_like(self) -> ChunkWeights:
        """Zeros where this has weights."""
        return ChunkWeights(*(None if w is None else torch.zeros_like(w) for w in self))

    def narrow(self, queries: slice, keys: slice) -> ChunkWeights:
        """Views of the weights of these queries and keys."""
        slices = [queries] * 3 + [keys] * 3
        return ChunkWeights(*(None if w is None else w[..., part] for w, part in zip(self, slices)))

    def batch_first(self) -> ComposeWeights:
        """The inverse of :meth:`of`."""
        return ComposeWeights(*(None if w is None else w.movedim((-2, -1), (0, 1)) for w in self))

    def transposed(self) -> ChunkWeights:
        """Weights of the transposed compose: dx = compose(dy) with these, for y = compose(x)."""
        return ChunkWeights(self.q2_RHBP, self.q1_RHBP, self.qg_HBP, self.k2_RHBP, self.k1_RHBP, self.kg_HBP)

    def accumulate_gradient(
        self, x_HBCV: Tensor, dy_HBCV: Tensor, latents: Latents, dlatents: Latents, scratch: Scratch
    ) -> None:
        """Add a chunk's gradient of the weights of y = compose(x) to this, which holds such gradients.

        Args:
            x_HBCV: input of the compose.
            dy_HBCV: gradient of its output.
            latents: of compose(x).
            dlatents: of compose(dy) with the transposed weights, which are the gradients of ``latents``.
            scratch: buffers; "product" is used.
        """
        product_HBCV = scratch.take("product", x_HBCV.shape)
        # dqg = sum_v x dy,  dkg = sum_c x dy
        if self.qg_HBP is not None or self.kg_HBP is not None:
            torch.mul(x_HBCV, dy_HBCV, out=product_HBCV)
            if self.qg_HBP is not None:
                self.qg_HBP.add_(product_HBCV.sum(3))
            if self.kg_HBP is not None:
                self.kg_HBP.add_(product_HBCV.sum(2))
        # dq1 = sum_v dlatent x,  dq2 = sum_v latent dy
        if self.q1_RHBP is not None:
            for total_RHBC, operand_HBCV, latent_NRV in (
                (self.q1_RHBP, x_HBCV, dlatents.query_NRV),
                (self.q2_RHBP, dy_HBCV, latents.query_NRV),
            ):
                gradient_NRH = torch.bmm(latent_NRV, _by_query(operand_HBCV).mT)
                total_RHBC += gradient_NRH.unflatten(0, x_HBCV.shape[1:3]).permute(2, 3, 0, 1)
        # dk1 = sum_c dlatent x,  dk2 = sum_c latent dy
        if self.k1_RHBP is not None:
            for total_RHBV, operand_HBCV, latent_RBCV in (
                (self.k1_RHBP, x_HBCV, dlatents.key_RBCV),
                (self.k2_RHBP, dy_HBCV, latents.key_RBCV),
            ):
                for total_HBV, latent_BCV in zip(total_RHBV, latent_RBCV):
                    total_HBV += torch.mul(operand_HBCV, latent_BCV, out=product_HBCV).sum(2)


def compose_chunk(
    x_HBCV: Tensor, weights: ChunkWeights, scratch: Scratch, out: str, latents: str
) -> tuple[Tensor, Latents]:
    """compose(x) and its latents, in the scratch buffers named ``out`` and ``latents``."""
    heads, batch, chunk, keys = x_HBCV.shape
    out_HBCV = scratch.take(out, x_HBCV.shape)
    # out = x (1 + qg + kg)
    if weights.kg_HBP is not None:
        torch.mul(x_HBCV, (1 + weights.kg_HBP).unsqueeze(2), out=out_HBCV)
        if weights.qg_HBP is not None:
            out_HBCV.addcmul_(x_HBCV, weights.qg_HBP.unsqueeze(3))
    elif weights.qg_HBP is not None:
        torch.mul(x_HBCV, (1 + weights.qg_HBP).unsqueeze(3), out=out_HBCV)
    else:
        out_HBCV.copy_(x_HBCV)

    latent_NRV = latent_RBCV = None
    if weights.q1_RHBP is not None:
        # latent_r = sum_g q1_rg x_g, as one batched product over the queries; out_h += q2_rh latent_r
        rank = weights.q1_RHBP.shape[0]
        latent_NRV = scratch.take(f"{latents}, by query", (batch * chunk, rank, keys))
        # Contiguous: bmm would copy any other layout, one matrix at a time.
        q1_NRH = weights.q1_RHBP.permute(2, 3, 0, 1).reshape(batch * chunk, rank, heads).contiguous()
        torch.bmm(q1_NRH, _by_query(x_HBCV), out=latent_NRV)
        for latent_NV, q2_HBC in zip(latent_NRV.unbind(1), weights.q2_RHBP):
            out_HBCV.addcmul_(latent_NV.unflatten(0, (batch, chunk)), q2_HBC.unsqueeze(3))
    if weights.k1_RHBP is not None:
        # latent_r = sum_g k1_rg x_g, along contiguous keys; out_h += k2_rh latent_r
        rank = weights.k1_RHBP.shape[0]
        latent_RBCV = scratch.take(f"{latents}, by key", (rank, batch, chunk, keys))
        latent_RBCV.zero_()
        for x_BCV, k1_RBV in zip(x_HBCV, weights.k1_RHBP.unbind(1)):
            latent_RBCV.addcmul_(x_BCV, k1_RBV.unsqueeze(2))
        for latent_BCV, k2_HBV in zip(latent_RBCV, weights.k2_RHBP):
            out_HBCV.addcmul_(latent_BCV, k2_HBV.unsqueeze(2))
    return out_HBCV, Latents(latent_NRV, latent_RBCV)


def _by_query(x_HBCV: Tensor) -> Tensor:
    """The same as [N, H, V], a view."""
    return x_HBCV.flatten(1, 2).transpose(0, 1)


def _forward(call: Call) -> list[Tensor]:
    out_BTHD = torch.empty_like(call.q, memory_format=torch.contiguous_format)
    for rows, batch_rows in _split_batch(call):
        out_BTHD[rows] = batch_rows.forward()
    return [out_BTHD]


def _backward(dout_BTHD: Tensor, _: list[Tensor], call: Call) -> Gradients:
    gradients = Gradients.empty(call)
    for rows, batch_rows in _split_batch(call):
        of_rows = batch_rows.backward(dout_BTHD[rows])
        for gradient, of_tensor in zip(gradients.tensors(), of_rows.tensors()):
            if gradient is not None:
                gradient[rows] = of_tensor
    return gradients


def _split_batch(call: Call) -> Iterator[tuple[slice, _BatchRows]]:
    """Groups of batch rows, each as large as the limits on a chunk's scores allow."""
    batch, queries, heads, _ = call.q.shape
    chunk = min(queries, MAX_CHUNK_QUERIES)
    positions = range(call.query_offset, call.query_offset + queries)
    keys = most_keys(positions, chunk, call.window, call.causal, call.k.shape[1])
    scratch = Scratch(call.q)
    # Scratch is 3 buffers of the scores' size in forward and 5 in backward, plus latents of 2 R / H of that size for
    # each compose: 2 in forward, 3 in backward.
    rank = max((w.shape[2] for w in (*call.pre, *call.post) if w is not None and w.dim() == 4), default=0)
    budget = int(call.scratch_bytes / scratch.dtype.itemsize / (5 + 3 * 2 * rank / heads))
    max_elements = min(MAX_SCORE_ELEMENTS, budget)
    size = max(1, max_elements // (heads * chunk * keys))
    for first in range(0, batch, size):
        rows = slice(first, first + size)
        yield rows, _BatchRows(_select_rows(call, rows), scratch, max_elements)


def _select_rows(call: Call, rows: slice) -> Call:
    pre, post = (ComposeWeights(*(None if w is None else w[rows] for w in stage)) for stage in (call.pre, call.post))
    document_ids_BS = None if call.document_ids is None else call.document_ids[rows]
    q_BTHD, k_BSGD, v_BSGD = call.q[rows], call.k[rows], call.v[rows]
    return call._replace(q=q_BTHD, k=k_BSGD, v=v_BSGD, pre=pre, post=post, document_ids=document_ids_BS)


class _BatchRows:
    """Some batch rows of a call, in the layout of the chunks, which share a scratch."""

    def __init__(self, call: Call, scratch: Scratch, max_elements: int):
        self.call, self.scratch, self.max_elements = call, scratch, max_elements
        self.group = call.q.shape[2] // call.k.shape[2]
        self.q_HBTD = self.heads_first(call.q)
        self.k_HBSD, self.v_HBSD = (self.heads_first(x).repeat_interleave(self.group, 0) for x in (call.k, call.v))
        self.pre, self.post = (ChunkWeights.of(stage, scratch.dtype) for stage in (call.pre, call.post))

    def forward(self) -> Tensor:
        """The output [B, T, H, D]."""
        out_HBTD = torch.empty_like(self.q_HBTD)
        for queries, keys in self.chunks():
            _, probabilities_HBCV, _ = self.probabilities(queries, keys)
            post = self.post.narrow(queries, keys)
            composed_HBCV, _ = compose_chunk(probabilities_HBCV, post, self.scratch, "composed", "post latents")
            out_MCD = torch.bmm(composed_HBCV.flatten(0, 1), _positions(self.v_HBSD, keys))
            _positions(out_HBTD, queries).copy_(out_MCD)
        return out_HBTD.permute(1, 2, 0, 3)

    def backward(self, dout_BTHD: Tensor) -> Gradients:
        """The gradients of these rows, in the computation's dtype."""
        scratch, scale = self.scratch, self.call.scale
        dout_HBTD = self.heads_first(dout_BTHD)
        dq_HBTD, dk_HBSD, dv_HBSD = (torch.zeros_like(x) for x in (self.q_HBTD, self.k_HBSD, self.v_HBSD))
        dpre, dpost = self.pre.zeros_like(), self.post.zeros_like()
        for queries, keys in self.chunks():
            q_MCD, dout_MCD = _positions(self.q_HBTD, queries), _positions(dout_HBTD, queries)
            k_MVD, v_MVD = _positions(self.k_HBSD, keys), _positions(self.v_HBSD, keys)
            pre, post = self.pre.narrow(queries, keys), self.post.narrow(queries, keys)
            scores, probabilities, pre_latents = self.probabilities(queries, keys)

            # P' = compose_post(P);  dv = P'^T dout;  dP' = dout v^T
            composed, post_latents = compose_chunk(probabilities, post, scratch, "composed", "post latents")
            _positions(dv_HBSD, keys).baddbmm_(composed.flatten(0, 1).mT, dout_MCD)
            dcomposed = scratch.take("gradient", scores.shape)
            torch.bmm(dout_MCD, v_MVD.mT, out=dcomposed.flatten(0, 1))
            # dP = compose_post^T(dP'), into the memory of P', which is no longer needed
            dprobabilities, dlatents = compose_chunk(
                dcomposed, post.transposed(), scratch, "composed", "gradient latents"
            )
            dpost.narrow(queries, keys).accumulate_gradient(probabilities, dcomposed, post_latents, dlatents, scratch)

            # Softmax: dS' = P (dP - sum_v P dP). The sum is not flash attention's rowsum(dout * out), because compose
            # comes between the softmax and the product with v.
            product = torch.mul(probabilities, dprobabilities, out=scratch.take("product", scores.shape))
            dlogits = dprobabilities.sub_(product.sum(-1, keepdim=True)).mul_(probabilities)
            # dS = compose_pre^T(dS'), into the memory of dP'
            dscores, dlatents = compose_chunk(dlogits, pre.transposed(), scratch, "gradient", "gradient latents")
            dpre.narrow(queries, keys).accumulate_gradient(scores, dlogits, pre_latents, dlatents, scratch)
            # dq = scale dS k;  dk = scale dS^T q
            _positions(dq_HBTD, queries).baddbmm_(dscores.flatten(0, 1), k_MVD, alpha=scale)
            _positions(dk_HBSD, keys).baddbmm_(dscores.flatten(0, 1).mT, q_MCD, alpha=scale)
        # Query heads that share a key/value head add up.
        dk_GBSD, dv_GBSD = (x.unflatten(0, (-1, self.group)).sum(1) for x in (dk_HBSD, dv_HBSD))
        dq, dk, dv = (x.permute(1, 2, 0, 3) for x in (dq_HBTD, dk_GBSD, dv_GBSD))
        return Gradients(dq, dk, dv, dpre.batch_first(), dpost.batch_first())

    def heads_first(self, x_BTHD: Tensor) -> Tensor:
        """A copy [H, B, T, D] in the computation's dtype."""
        return x_BTHD.to(self.scratch.dtype).permute(2, 0, 1, 3).contiguous()

    def chunks(self) -> Iterator[tuple[slice, slice]]:
        """The queries of each chunk, and the keys that they see."""
        heads, batch, queries, _ = self.q_HBTD.shape
        offset, window, causal = self.call.query_offset, self.call.window, self.call.causal
        start = 0
        while start < queries:
            # Halve the chunk until its scores meet the limit.
            size = MAX_CHUNK_QUERIES
            while True:
                end = min(start + size, queries)
                keys = slice(*key_range(offset + start, offset + end - 1, window, causal, self.k_HBSD.shape[2]))
                if size == 1 or heads * batch * (end - start) * (keys.stop - keys.start) <= self.max_elements:
                    break
                size //= 2
            yield slice(start, end), keys
            start = end

    def probabilities(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Latents]:
        """Scores and probabilities [H, B, C, V], in scratch buffers of these names, and the latents of pre."""
        q_MCD, k_MVD = _positions(self.q_HBTD, queries), _positions(self.k_HBSD, keys)
        scores_HBCV = self.scratch.take("scores", (*self.q_HBTD.shape[:2], q_MCD.shape[1], k_MVD.shape[1]))
        # Scale the product, not q: scaling q would round once more. beta=0 ignores the old content of the buffer.
        scores_HBCV.flatten(0, 1).baddbmm_(q_MCD, k_MVD.mT, beta=0, alpha=self.call.scale)
        pre = self.pre.narrow(queries, keys)
        logits_HBCV, latents = compose_chunk(scores_HBCV, pre, self.scratch, "composed", "pre latents")
        offset = self.call.query_offset
        seen = visible_keys(
            range(offset + queries.start, offset + queries.stop),
            range(keys.start, keys.stop),
            self.call.window,
            self.call.causal,
            self.call.document_ids,
            logits_HBCV.device,
        )
        if seen is not None:
            # Adding one mask of 0 and -inf to all heads is ten times as fast as masked_fill_ on each of them.
            logits_HBCV += logits_HBCV.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        probabilities_HBCV = self.scratch.take("probabilities", logits_HBCV.shape)
        return scores_HBCV, torch.softmax(logits_HBCV, -1, out=probabilities_HBCV), latents


def _positions(x_HBTD: Tensor, part: slice) -> Tensor:
    """These positions as [M, C, D], a view."""
    return x_HBTD[:, :, part].flatten(0, 1)


chunked_attention = define_operator("compose_chunked", _forward, _backward)
