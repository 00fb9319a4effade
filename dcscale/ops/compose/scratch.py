"""Scratch memory of compose attention, where it is not given, from the device's total memory and the shapes alone.

Not from the memory that is free at the moment: scratch decides the sizes of the chunks, and with them the bits of the
results, which must not depend on what else is allocated.

Axes in names: B batch, T queries, S keys, H query heads, G key/value heads, D head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dcscale.ops.compose.custom_op import SCRATCH_BYTES
from dcscale.ops.flash import assume_constant_result

QUERIES_STEP = 128
"""Queries of a block of a windowed layer, which sees as many keys beyond the window."""

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
    batch: int,
    queries: int,
    keys: int,
    heads: int,
    window: int | None,
    element_size: int,
    causal: bool = True,
) -> int:
    """Scratch memory for a backward pass in one chunk, in bytes, a multiple of 2**20, as far as the device has it.

    Each further chunk takes up to 14 launches, and adds its dk and dv to float32 sums. With little scratch the launches
    take longer than their kernels: on an H100, T = 4096, H = 32, forward and backward took 54 ms with 256 MiB and 14 ms
    with 1 GiB (tools/results/first-look-nvidia-h100-80gb-hbm3-before.json).

    Args:
        memory: total memory of the device, in bytes; None for a CPU, where scratch has its default size.
        batch: B. Whether a sequence is one chunk does not depend on it, and so neither do the bits of its results.
        queries: T of a sequence.
        keys: S.
        heads: H.
        window: keys that a query sees; None for no limit.
        element_size: bytes of an input element.
        causal: otherwise a query sees as many keys after it as before.
    """
    if memory is None:
        return SCRATCH_BYTES
    scores = queries * keys
    if window is not None:
        scores = min(scores, queries * (window * (1 if causal else 2) + QUERIES_STEP))
    # A score takes four elements a head, and partial sums up to three bytes more; and four float32 latents.
    wanted = batch * scores * ((4 * element_size + 3) * heads + 16)
    mib = min(math.ceil(wanted / _MIB), memory // MEMORY_PARTS // _MIB)
    return max(mib * _MIB, SCRATCH_BYTES)


def default_scratch_bytes(q_BTHD: Tensor, k_BSGD: Tensor, window: int | None, causal: bool) -> int:
    """:func:`derived_scratch_bytes` for these tensors on their device."""
    batch, queries, heads, _ = q_BTHD.shape
    return derived_scratch_bytes(
        total_memory(q_BTHD.device.type, q_BTHD.device.index),
        batch=batch,
        queries=queries,
        keys=k_BSGD.shape[1],
        heads=heads,
        window=window,
        element_size=q_BTHD.element_size(),
        causal=causal,
    )
