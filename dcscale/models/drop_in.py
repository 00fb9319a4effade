"""DCMHA as a layer for other models: vision, encoders, cross attention.

Axes in names: B batch, T queries, S keys, E width of x, C width of the sequence with the keys, H query heads,
G key/value heads, D head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dcscale.config.schema import ComposeConfig
from dcscale.models.dcmha import ComposeProjection
from dcscale.models.init import compose_deviations
from dcscale.ops import ComposeWeights, apply_rope, compose_attention


class DCMHA(nn.Module):
    """Multi-head attention with dynamically composed heads (Xiao et al., ICML 2024, arXiv 2405.08553).

    In an encoder, for example a ViT, whose x [B, T, 768] has position embeddings added::

        attention = DCMHA(768, heads=12, causal=False)
        x = x + attention(norm(x))

    Cross attention from text [B, T, 512] to image features [B, S, 768]::

        attention = DCMHA(512, heads=8, context_dim=768, causal=False)
        text = text + attention(norm(text), image)

    The compose weights by query come from x, those by key from the sequence of the keys. Both inputs should be
    normalised. At first compose is near the identity: the layer starts as plain attention. There is no dropout.

    Args:
        dim: E.
        heads: H.
        kv_heads: G, a divisor of H; H by default.
        head_dim: D; E / H by default.
        context_dim: C of cross attention; None for self-attention.
        causal: a query sees the keys up to its own position only.
        window: a query sees keys at a distance below this only, before and, without ``causal``, after it.
        rank: R of the compose weights.
        bias: whether the four projections have biases.
        backend: as in :func:`dcscale.ops.compose_attention`.

    Raises:
        ValueError: sizes do not match, or cross attention is causal or has a window.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        context_dim: int | None = None,
        causal: bool = True,
        window: int | None = None,
        rank: int = 2,
        bias: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        if head_dim is None and dim % heads:
            raise ValueError(f"dim {dim} is not a multiple of heads {heads}: change one or set head_dim")
        kv_heads, self.head_dim = kv_heads or heads, head_dim or dim // heads
        if heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} does not divide heads {heads}")
        if context_dim is not None and (causal or window is not None):
            raise ValueError(
                f"causal={causal} and window={window} have no meaning in cross attention (context_dim {context_dim}): "
                f"pass causal=False and no window"
            )
        self.is_cross, self.causal, self.window, self.backend = context_dim is not None, causal, window, backend
        context_dim = context_dim or dim
        self.q = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k = nn.Linear(context_dim, kv_heads * self.head_dim, bias=bias)
        self.v = nn.Linear(context_dim, kv_heads * self.head_dim, bias=bias)
        self.out = nn.Linear(heads * self.head_dim, dim, bias=bias)
        self.compose_q = ComposeProjection(dim, heads, ComposeConfig(rank=rank, key_wise=False))
        self.compose_k = ComposeProjection(context_dim, heads, ComposeConfig(rank=rank, query_wise=False))
        for width, projection in ((dim, self.compose_q), (context_dim, self.compose_k)):
            for name, std in compose_deviations(width, heads, ComposeConfig(rank=rank)).items():
                nn.init.normal_(getattr(projection, name), std=std)

    def forward(
        self,
        x_BTE: Tensor,
        context_BSC: Tensor | None = None,
        document_ids_BT: Tensor | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attention over x or, in cross attention, over the context -> [B, T, E].

        Args:
            x_BTE: the sequence of the queries.
            context_BSC: the sequence of the keys of cross attention.
            document_ids_BT: integers; a query sees keys of its own document only. Padding can be such a document.
            rope: (cos, sin) of self-attention as in :func:`dcscale.ops.apply_rope`.

        Raises:
            ValueError: a context is missing or not expected, or comes with documents or rope.
        """
        if self.is_cross:
            if context_BSC is None:
                raise ValueError("context is None, but this layer (context_dim is set) is cross attention: pass one")
            if document_ids_BT is not None or rope is not None:
                raise ValueError("document_ids and rope are for self-attention: a context has other positions than x")
        elif context_BSC is not None:
            raise ValueError(
                f"context has shape {tuple(context_BSC.shape)}, but this layer is self-attention: "
                f"build it with context_dim and causal=False"
            )
        else:
            context_BSC = x_BTE
        q_BTHD = self.q(x_BTE).unflatten(-1, (-1, self.head_dim))
        k_BSGD, v_BSGD = (each(context_BSC).unflatten(-1, (-1, self.head_dim)) for each in (self.k, self.v))
        if rope is not None:
            q_BTHD, k_BSGD = apply_rope(q_BTHD, *rope), apply_rope(k_BSGD, *rope)
        out_BTHD = compose_attention(
            q_BTHD,
            k_BSGD,
            v_BSGD,
            *self._weights(x_BTE, context_BSC, q_BTHD.dtype),
            causal=self.causal,
            window=self.window,
            document_ids=document_ids_BT,
            backend=self.backend,
        )
        return self.out(out_BTHD.flatten(2))

    def _weights(self, x_BTE: Tensor, context_BSC: Tensor, dtype: torch.dtype) -> list[ComposeWeights]:
        """[pre, post]. Autocast computes some of them in float32, so they are cast to the dtype of q."""
        stages = zip(self.compose_q(x_BTE), self.compose_k(context_BSC))
        return [ComposeWeights(*(w.to(dtype) for w in (*by_query[:3], *by_key[3:]))) for by_query, by_key in stages]
