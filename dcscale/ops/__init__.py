"""Pure tensor functions: plain and compose attention, rotary embedding, loss. No configs, modules or process groups."""

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
