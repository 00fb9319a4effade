"""Attention layer, plain or dynamically composed (DCMHA; Xiao et al., ICML 2024, arXiv 2405.08553).

Axes in names: B batch, T tokens, E model width, H query heads, G key/value heads, D head width,
C active compose branches, R rank, K = 2*R*H hidden width of a compose branch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dcscale.config.schema import ComposeConfig, ModelConfig
from dcscale.models.cache import LayerCache
from dcscale.ops import ComposeWeights, apply_rope, choose_backend, compose_attention
from dcscale.ops.compose.custom_op import SCRATCH_BYTES, Call
from dcscale.ops.compose.decode import MAX_QUERIES, decode_attention, suits_decode

W1_EPS = 1e-6
"""Epsilon of w1's normalisation, as in upstream's JAX and PyTorch code, where it is not a setting either."""


def active_branches(compose: ComposeConfig) -> tuple[tuple[str, str], ...]:
    """The (stage, side) pairs that are switched on, in the order of axis C of every parameter.

    All pairs are (pre, query), (pre, key), (post, query), (post, key): ``pre`` composes the scores, ``post`` the
    probabilities. Empty if nothing of compose is switched on.
    """
    if not (compose.low_rank or compose.gates):
        return ()
    stages = [stage for stage, on in (("pre", compose.pre), ("post", compose.post)) if on]
    sides = [side for side, on in (("query", compose.query_wise), ("key", compose.key_wise)) if on]
    return tuple((stage, side) for stage in stages for side in sides)


class ComposeProjection(nn.Module):
    """Computes the compose weights of every token from the layer's normalised input (paper, section 3).

    Parameters: ``dw1`` [E, C, K] and ``qkw`` [C, K, 2R, H] for the low-rank part, ``dd`` [E, C*H] for the gates; None
    if the part is switched off. For branch c and the input x of one token::

        w1, w2 = split(gelu(x @ dw1[:, c]) @ qkw[c])      R rows each;  w1 <- w1 / rms(w1 over heads)
        gate   = tanh(x @ dd[:, c])

    Raises:
        ValueError: every part is switched off, or the rank is below 1.
    """

    def __init__(self, dim: int, heads: int, compose: ComposeConfig):
        super().__init__()
        self.branches = active_branches(compose)
        if not self.branches:
            raise ValueError(f"every part of compose is switched off ({compose}): use plain attention")
        if compose.rank < 1:
            raise ValueError(
                f"compose.rank is {compose.rank}, but must be 1 or more; low_rank=false leaves the gates only"
            )
        self.heads = heads
        self.rank = compose.rank
        self.gelu_approximation = {"tanh": "tanh", "erf": "none"}[compose.gelu]
        branches, hidden = len(self.branches), 2 * compose.rank * heads
        self.dw1 = self.qkw = self.dd = None
        if compose.low_rank:
            self.dw1 = nn.Parameter(torch.empty(dim, branches, hidden))
            self.qkw = nn.Parameter(torch.empty(branches, hidden, 2 * compose.rank, heads))
        if compose.gates:
            self.dd = nn.Parameter(torch.empty(dim, branches * heads))

    def forward(self, x_BTE: Tensor) -> tuple[ComposeWeights | None, ComposeWeights | None]:
        """The weights (pre, post) in x's dtype: w1 and w2 [B, T, R, H], gates [B, T, H]; None if switched off."""
        return self.weights(*(x_BTE @ matrix for matrix in self.input_matrices()))

    def input_matrices(self) -> list[Tensor]:
        """[E, C*K] and [E, C*H], those that are switched on: the inputs of :meth:`weights` are x times them."""
        return ([] if self.dw1 is None else [self.dw1.flatten(1)]) + ([] if self.dd is None else [self.dd])

    def weights(self, *projected: Tensor) -> tuple[ComposeWeights | None, ComposeWeights | None]:
        """As :meth:`forward`, from the products of x with :meth:`input_matrices`."""
        weights: dict[str, dict[str, Tensor]] = {stage: {} for stage, _ in self.branches}
        if self.dw1 is not None:
            hidden_BTX = F.gelu(projected[0], approximate=self.gelu_approximation)
            # The one product that einsum("btck,ckrh->cbtrh") is; for a single token einsum would take longer than it.
            hidden_CNK = hidden_BTX.reshape(-1, *self.dw1.shape[1:]).transpose(0, 1)
            w_CNX = torch.bmm(hidden_CNK, self.qkw.flatten(2))
            w_CBTRH = w_CNX.view(-1, *hidden_BTX.shape[:2], 2 * self.rank, self.heads)
            w1_CBTRH, w2_CBTRH = w_CBTRH[:, :, :, : self.rank], w_CBTRH[:, :, :, self.rank :]
            # F.rms_norm computes in float32 internally, whatever the dtype of its input, and rounds once.
            w1_CBTRH = F.rms_norm(w1_CBTRH, (self.heads,), eps=W1_EPS)
            for (stage, side), w1_BTRH, w2_BTRH in zip(self.branches, w1_CBTRH.unbind(), w2_CBTRH.unbind()):
                # Names of ComposeWeights: q1, q2, qg for the query side, k1, k2, kg for the key side.
                weights[stage][side[0] + "1"], weights[stage][side[0] + "2"] = w1_BTRH, w2_BTRH
        if self.dd is not None:
            gates_BTCH = torch.tanh(projected[-1]).unflatten(-1, (-1, self.heads))
            for (stage, side), gate_BTH in zip(self.branches, gates_BTCH.unbind(2)):
                weights[stage][side[0] + "g"] = gate_BTH
        return _by_stage(weights)

    def shapes(self, device: torch.device, dtype: torch.dtype) -> tuple[ComposeWeights | None, ComposeWeights | None]:
        """Zeros with the shapes of one position's weights.

        Does not use the parameters, which ZeRO-3 may keep on other ranks.
        """
        low_rank = torch.zeros(1, 1, self.rank, self.heads, device=device, dtype=dtype)
        weights: dict[str, dict[str, Tensor]] = {stage: {} for stage, _ in self.branches}
        for stage, side in self.branches:
            if self.dw1 is not None:
                weights[stage] |= {side[0] + "1": low_rank, side[0] + "2": low_rank}
            if self.dd is not None:
                weights[stage][side[0] + "g"] = low_rank[:, :, 0]
        return _by_stage(weights)


class Attention(nn.Module):
    """Causal self-attention with optional window, qk-norm, rotary embedding, grouped queries and compose.

    ``compose`` is None for plain attention, and if every part of compose is switched off.

    Args:
        window: number of keys that a query sees, including its own; None for all previous keys.

    Raises:
        ValueError: the sizes do not match.
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        if config.head_dim is None and config.dim % config.heads:
            raise ValueError(f"dim {config.dim} is not a multiple of heads {config.heads}: change one or set head_dim")
        self.head_dim = config.head_dim or config.dim // config.heads
        kv_heads = config.kv_heads or config.heads
        if config.heads % kv_heads:
            raise ValueError(f"kv_heads {kv_heads} does not divide heads {config.heads}")
        rope_dim = rotary_dim(config)
        if rope_dim < 2 or rope_dim > self.head_dim or rope_dim % 2:
            raise ValueError(
                f"rope_fraction {config.rope_fraction} rotates {rope_dim} of {self.head_dim} head dimensions: "
                f"this must be an even number of at least 2"
            )
        self.window = window
        self.heads = config.heads
        self.backend = config.backend
        self.scratch_bytes = None if config.scratch_mib is None else config.scratch_mib * 2**20
        qkv_bias = config.bias or config.qkv_bias
        self.q = nn.Linear(config.dim, config.heads * self.head_dim, bias=qkv_bias)
        self.k = nn.Linear(config.dim, kv_heads * self.head_dim, bias=qkv_bias)
        self.v = nn.Linear(config.dim, kv_heads * self.head_dim, bias=qkv_bias)
        self.out = nn.Linear(config.heads * self.head_dim, config.dim, bias=config.bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config.qk_norm_eps)
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config.qk_norm_eps)
        self.compose = None
        if config.attention == "dcmha" and active_branches(config.compose):
            self.compose = ComposeProjection(config.dim, config.heads, config.compose)

    def implementation(self, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
        """(name, reason) of the implementation for activations of this dtype and device: see :func:`choose_backend`."""
        q_11HD = torch.zeros(1, 1, self.heads, self.head_dim, device=device, dtype=dtype)
        pre, post = (None, None) if self.compose is None else self.compose.shapes(device, dtype)
        return choose_backend(self.backend, q_11HD, pre, post, kv_heads=self.k.out_features // self.head_dim)

    def forward(
        self,
        x_BTE: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BT: Tensor | None = None,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """Computes attention over x [B, T, E], which is normalised, and the tokens in ``cache``: -> [B, T, E].

        Args:
            rope: (cos, sin), float32 [T, rotated dimensions / 2], or [B, T, rotated dimensions / 2].
            document_ids_BT: integers; a query sees only keys of its own document. With a cache, [B, all positions].
            cache: this layer's, to which the new positions are added.
        """
        decoding = cache is not None and x_BTE.shape[1] <= MAX_QUERIES
        if decoding and cache.fuse and cache.fused is None:
            cache.fused = FusedProjection.of(self)
        fused = cache.fused if decoding else None
        projected = self._project(x_BTE, rope) if fused is None else self._project_fused(x_BTE, rope, fused)
        q_BTHD, k_BTGD, v_BTGD, pre, post = projected
        if cache is not None:
            k_BTGD, v_BTGD, pre, post = cache.extend(k_BTGD, v_BTGD, pre, post)
            if document_ids_BT is not None:
                # A layer with a window does not keep all positions.
                document_ids_BT = document_ids_BT[:, -k_BTGD.shape[1] :]
        out_BTHD = self._attend(q_BTHD, k_BTGD, v_BTGD, pre, post, document_ids_BT, decoding)
        return self.out(out_BTHD.flatten(2))

    def _attend(
        self,
        q_BTHD: Tensor,
        k_BSGD: Tensor,
        v_BSGD: Tensor,
        pre: ComposeWeights | None,
        post: ComposeWeights | None,
        document_ids_BS: Tensor | None,
        decoding: bool,
    ) -> Tensor:
        if decoding and self.compose is not None and self.backend != "reference":
            # The backends are for long sequences. Tensors that come from the cache need no checks.
            call = Call(
                q_BTHD,
                k_BSGD,
                v_BSGD,
                ComposeWeights() if pre is None else pre,
                ComposeWeights() if post is None else post,
                document_ids_BS,
                window=self.window,
                scale=self.head_dim**-0.5,
                query_offset=k_BSGD.shape[1] - q_BTHD.shape[1],
                scratch_bytes=self.scratch_bytes or SCRATCH_BYTES,
            )
            if suits_decode(call):
                return decode_attention(call)
        return compose_attention(
            q_BTHD,
            k_BSGD,
            v_BSGD,
            pre,
            post,
            window=self.window,
            document_ids=document_ids_BS,
            backend=self.backend,
            scratch_bytes=self.scratch_bytes,
        )

    def _project(self, x_BTE: Tensor, rope: tuple[Tensor, Tensor]) -> _Projected:
        q_BTHD = self.q(x_BTE).unflatten(-1, (-1, self.head_dim))
        k_BTGD = self.k(x_BTE).unflatten(-1, (-1, self.head_dim))
        v_BTGD = self.v(x_BTE).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None:  # before RoPE, as upstream
            q_BTHD, k_BTGD = self.q_norm(q_BTHD), self.k_norm(k_BTGD)
        q_BTHD, k_BTGD = apply_rope(q_BTHD, *rope), apply_rope(k_BTGD, *rope)
        pre, post = (None, None) if self.compose is None else self.compose(x_BTE)
        return q_BTHD, k_BTGD, v_BTGD, pre, post

    def _project_fused(self, x_BTE: Tensor, rope: tuple[Tensor, Tensor], fused: FusedProjection) -> _Projected:
        """As :meth:`_project`, in fewer steps."""
        projected_BTX = x_BTE @ fused.matrix_EX
        if fused.bias_X is not None:
            projected_BTX += fused.bias_X
        qk_BTX, v_BTX, *for_compose = projected_BTX.split_with_sizes(fused.widths, -1)
        qk_BTQD, v_BTGD = (x.view(*x.shape[:2], -1, self.head_dim) for x in (qk_BTX, v_BTX))
        if fused.norm_QD is not None:
            qk_BTQD = F.rms_norm(qk_BTQD.to(fused.norm_QD.dtype), (self.head_dim,), eps=self.q_norm.eps) * fused.norm_QD
        qk_BTQD = apply_rope(qk_BTQD, *rope).to(v_BTGD.dtype)
        pre, post = (None, None) if self.compose is None else self.compose.weights(*for_compose)
        return qk_BTQD[:, :, : self.heads], qk_BTQD[:, :, self.heads :], v_BTGD, pre, post


_Projected = tuple[Tensor, Tensor, Tensor, ComposeWeights | None, ComposeWeights | None]
"""q, k (both after norm and RoPE), v, pre, post."""


class FusedProjection(NamedTuple):
    """A copy of the weights by which a layer's input is multiplied: for decoding, where one product with all of them
    takes half the time of one with each. Q in names counts query heads and then key heads, X all columns.
    """

    matrix_EX: Tensor
    """q, k, v and :meth:`ComposeProjection.input_matrices`."""
    bias_X: Tensor | None
    widths: list[int]
    """Columns of q and k together, v, and each of compose's matrices."""
    norm_QD: Tensor | None
    """Scales of q_norm and k_norm, float32 or float64."""

    @classmethod
    def of(cls, attention: Attention) -> FusedProjection | None:
        """None if modules must be called: they have hooks, as under ZeRO-3 to gather the weights, or other types."""
        linears = [attention.q, attention.k, attention.v]
        modules = [*linears, attention.q_norm, attention.k_norm, attention.compose]
        modules = [module for module in modules if module is not None]
        if any(type(linear) is not nn.Linear for linear in linears):
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            return None
        matrices = [linear.weight.T for linear in linears]
        if attention.compose is not None:
            matrices += attention.compose.input_matrices()
        q_width, k_width, *widths = (matrix.shape[1] for matrix in matrices)
        bias_X = norm_QD = None
        if attention.q.bias is not None:
            bias_X = F.pad(torch.cat([linear.bias for linear in linears]), (0, sum(widths[1:])))
        if attention.q_norm is not None:
            sides = ((attention.q_norm, q_width), (attention.k_norm, k_width))
            norm_QD = torch.cat([norm.weight.expand(width // attention.head_dim, -1) for norm, width in sides])
            norm_QD = norm_QD.to(torch.promote_types(norm_QD.dtype, torch.float32))
        return cls(torch.cat(matrices, 1), bias_X, [q_width + k_width, *widths], norm_QD)


def _by_stage(weights: dict[str, dict[str, Tensor]]) -> tuple[ComposeWeights | None, ComposeWeights | None]:
    """(pre, post); None for a stage without weights."""
    pre, post = (ComposeWeights(**weights[stage]) if stage in weights else None for stage in ("pre", "post"))
    return pre, post


def rotary_dim(config: ModelConfig) -> int:
    """Number of dimensions of each head that RoPE rotates."""
    return int(config.rope_fraction * (config.head_dim or config.dim // config.heads))
