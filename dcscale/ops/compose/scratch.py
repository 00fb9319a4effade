"""Scratch memory of compose attention, where it is not given, from the device's total memory and the shapes alone.

Not from the memory that is free at the moment: scratch decides the sizes of the chunks, and with them the bits of the
results, which must not depend on what else is allocated.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width; C queries of a chunk.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import SCRATCH_BYTES
from dcscale.ops.flash import assume_constant_result

QUERIES_STEP = 128
"""Queries of a block of a windowed layer, which sees as many keys beyond the window; C is a multiple of it."""

LEAST_QUERIES = 512
"""Of a chunk: with fewer, matrix products are inefficient and launches many."""

MEMORY_PARTS = 24
"""Scratch takes at most one of so many parts of the device's total memory."""

_MIB = 2**20


@assume_constant_result
def total_memory(device_type: str, index: int | None) -> int | None:
    """Total memory of a GPU in bytes; None for other devices."""
    return torch.cuda.get_device_properties(index).total_memory if device_type == "cuda" else None


def derived_scratch_bytes(
    memory: int | None,
    *,
    queries: int,
    keys: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int | None,
    element_size: int,
    causal: bool = True,
) -> int:
    """Scratch memory for the backward pass of one sequence, in bytes, a multiple of 2**20; more rows take more chunks.

    Backward adds each chunk's dk and dv to float32 sums: it reads and writes 16 D G bytes a key, for C H scores. The
    chunks are made large enough that this is at most 3 bytes a score. With a window, all blocks of the sequence may be
    one chunk, if that is not more.

    Args:
        memory: total memory of the device, in bytes; None for a CPU, where scratch has its default size.
        queries: T of a sequence.
        keys: S.
        heads: H.
        kv_heads: G.
        head_dim: D.
        window: keys that a query sees; None for no limit.
        element_size: bytes of an input element.
        causal: otherwise a query sees as many keys after it as before.
    """
    if memory is None:
        return SCRATCH_BYTES
    # 16 D G / (C H) <= 3, rounded up to a multiple of QUERIES_STEP
    chunk = QUERIES_STEP * math.ceil(16 * head_dim * kv_heads / (3 * heads * QUERIES_STEP))
    scores = min(max(chunk, LEAST_QUERIES), queries) * keys
    if window is not None:
        scores = min(scores, queries * (window * (1 if causal else 2) + QUERIES_STEP))
    # A score takes four elements a head, and partial sums and copies up to one more; and four float32 latents.
    wanted = scores * (5 * element_size * heads + 16)
    mib = min(math.ceil(wanted / _MIB), memory // MEMORY_PARTS // _MIB)
    return max(mib * _MIB, SCRATCH_BYTES)


def default_scratch_bytes(q_BTHD: Tensor, k_BSGD: Tensor, window: int | None, causal: bool) -> int:
    """:func:`derived_scratch_bytes` for these tensors on their device."""
    _, queries, heads, head_dim = q_BTHD.shape
    return derived_scratch_bytes(
        total_memory(q_BTHD.device.type, q_BTHD.device.index),
        queries=queries,
        keys=k_BSGD.shape[1],
        heads=heads,
        kv_heads=k_BSGD.shape[2],
        head_dim=head_dim,
        window=window,
        element_size=q_BTHD.element_size(),
        causal=causal,
    )
