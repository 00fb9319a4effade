"""Transformer block: norms, feed-forward networks, and the block itself.

Axes in names: B batch, T tokens, E model width, F hidden width of the feed-forward network, G gates.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from dcscale.config.schema import ModelConfig
from dcscale.models.cache import LayerCache
from dcscale.models.dcmha import Attention


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm of blocks and of the output: RMSNorm with scale, or LayerNorm with scale and bias, over E."""
    norm = {"rmsnorm": nn.RMSNorm, "layernorm": nn.LayerNorm}[config.norm]
    return norm(config.dim, eps=config.norm_eps)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv 2002.05202), with upstream's optional multi-gate.

    ``multi_gate`` splits the hidden width into equal parts and scales each by one entry of softmax(multi_gate(x)).

    Raises:
        ValueError: ``multi_gate`` does not divide ``ffn_dim``.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)
        self.multi_gate = None
        if config.multi_gate is not None:
            if config.multi_gate < 1 or config.ffn_dim % config.multi_gate:
                raise ValueError(f"multi_gate {config.multi_gate} does not divide ffn_dim {config.ffn_dim}")
            # Without a bias, as in upstream, even if the other matrices have one.
            self.multi_gate = nn.Linear(config.dim, config.multi_gate, bias=False)

    def forward(self, x_BTE: Tensor) -> Tensor:
        hidden_BTF = F.silu(self.gate(x_BTE)) * self.up(x_BTE)
        if self.multi_gate is not None:
            # For bfloat16, softmax computes in float32 internally and rounds once.
            gates_BTG = self.multi_gate(x_BTE).softmax(-1)
            hidden_BTF = (hidden_BTF.unflatten(-1, (gates_BTG.shape[-1], -1)) * gates_BTG.unsqueeze(-1)).flatten(-2)
        return self.down(hidden_BTF)


class GeluFFN(nn.Module):
    """down(gelu(up(x))) with the exact (erf) GELU, as in Pythia."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.multi_gate is not None:
            raise ValueError(
                f"multi_gate {config.multi_gate} needs ffn swiglu, but ffn is gelu: set multi_gate to null"
            )
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=config.bias)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=config.bias)

    def forward(self, x_BTE: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTE)))


class Block(nn.Module):
    """One pre-norm layer: attention, then feed-forward, each added to the residual stream.

        x <- x + attention(norm(x));  x <- x + ffn(norm(x))

    With ``parallel_residual`` (Pythia) both read the block's input: x + attention(norm(x)) + ffn(norm(x)).

    Args:
        window: number of keys that a query sees, including its own; None for all previous keys.
    """

    def __init__(self, config: ModelConfig, window: int | None):
        super().__init__()
        self.parallel_residual = config.parallel_residual
        self.attention_norm = make_norm(config)
        self.attention = Attention(config, window)
        self.ffn_norm = make_norm(config)
        self.ffn = {"swiglu": SwiGLU, "gelu": GeluFFN}[config.ffn](config)

    def forward(
        self,
        x_BTE: Tensor,
        rope: tuple[Tensor, Tensor],
        document_ids_BT: Tensor | None = None,
        *,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, E] -> [B, T, E]; the other arguments are those of :meth:`Attention.forward`."""
        attended_BTE = x_BTE + self.attention(self.attention_norm(x_BTE), rope, document_ids_BT, cache=cache)
        ffn_input_BTE = x_BTE if self.parallel_residual else attended_BTE
        return attended_BTE + self.ffn(self.ffn_norm(ffn_input_BTE))
