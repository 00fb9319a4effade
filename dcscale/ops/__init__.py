"""Pure tensor functions: attention, plain and composed, rotary embedding, loss. They know no config and no module."""

from dcscale.ops.attention import attention
from dcscale.ops.compose import ComposeWeights, choose_backend, compose_attention, identity_distance
from dcscale.ops.loss import bits_per_byte, cross_entropy_sum
from dcscale.ops.rope import apply_rope, llama3_frequencies, rope_table

__all__ = [
    "ComposeWeights",
    "apply_rope",
    "attention",
    "bits_per_byte",
    "choose_backend",
    "compose_attention",
    "cross_entropy_sum",
    "identity_distance",
    "llama3_frequencies",
    "rope_table",
]
