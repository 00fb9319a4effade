"""Dynamically composable multi-head attention (DCMHA): the definition, and its faster backends."""

from dcscale.ops.compose.api import choose_backend, compose_attention
from dcscale.ops.compose.weights import ComposeWeights, identity_distance

__all__ = ["ComposeWeights", "choose_backend", "compose_attention", "identity_distance"]
