"""Benchmark of attention: cases and implementations, then errors, then times and memory, then the report.

Axes in names: B batch, T queries, S keys (as many), H heads, D head dim.

The choices of tools/bench_attention.py are here, so that its ``--help`` does not import torch.
"""

DTYPE_NAMES = ("fp32", "bf16", "fp16")

FUSED_BACKENDS = ("chunked", "compiled", "triton")
"""Backends of :func:`dcscale.ops.compose_attention` that are implementations and not the definition."""

PLAIN = ("sdpa", "flash-attn-4", "flash-attn-3", "flash-attn")
"""Kinds of plain attention over all keys before a query. The fastest in a case is the baseline of the case's ratios."""

KINDS = {
    "dense": "compose attention, the dense formula in plain PyTorch, every step in the input's dtype",
    "dense-compiled": "the same through torch.compile",
    **{name: f"compose attention, backend {name!r}" for name in FUSED_BACKENDS},
    "sdpa": "plain attention over all keys before a query, by every fused backend of scaled_dot_product_attention",
    **{
        name: f"the same by the package {name}, with its fastest backward pass and with the deterministic one"
        for name in PLAIN[1:]
    },
    "windowed": "plain attention with the case's window: dcscale.ops.attention",
}
"""Kinds of implementations that are measured, and what each is."""
