"""Dynamically composable multi-head attention: the definition, and implementations of it that are made to be fast."""

from dcscale.ops.compose.api import choose_backend, compose_attention
from dcscale.ops.compose.weights import ComposeWeights, identity_distance

__all__ = ["ComposeWeights", "choose_backend", "compose_attention", "identity_distance"]
