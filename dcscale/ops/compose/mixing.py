"""Compose and its gradient on the maps of one chunk of queries: a few batched products, the rest passes in place.

Axes in names: H heads, B batch, C queries of the chunk, N = B * C, S keys the chunk sees, R rank, P any positions.
Maps lie as [H, B, C, S]. Then the query-wise latents are one batched product over N, everything key-wise runs along
contiguous keys, and no map is ever transposed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


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
