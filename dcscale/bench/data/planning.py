"""Planning a very large epoch."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from dcscale.bench.data import clock
from dcscale.data.order import Order

SHARDS = 1_000_000


def planning(shards: int = SHARDS) -> dict[str, Any]:
    """Seconds and memory from the shards' sizes to the place of a sequence.

    The memory is that of the process at its peak, above what it had before.
    """
    sizes = np.random.default_rng(0).integers(1 << 20, 1 << 21, shards).tolist()
    clock.reset_peak()
    before, began = clock.memory_bytes("VmRSS"), time.perf_counter()
    order = Order(sizes, sequence_length=4096, slots=480, shuffle_shards=8, seed=1)
    order.pieces(*order.locate(order.sequences_per_epoch // 2))
    seconds = time.perf_counter() - began
    return {"shards": shards, "seconds": seconds, "bytes": clock.memory_bytes("VmHWM") - before}
