"""The order of sequences: how well it mixes, and what planning a very large epoch costs.

Mixing is measured on sequences whose topic is known, in the order in which they are handed over.

Every document has a topic, a number drawn from a standard normal distribution, and documents that lie together share
it, as those of a crawl do. A batch is as good as random if the mean over its documents varies as that of as many
documents drawn at random, and neighbouring batches have nothing in common.
"""

from __future__ import annotations

import random
import time
from itertools import chain
from typing import Any

import numpy as np
import webdataset

from dcscale.bench import meter
from dcscale.data.stream.order import Order

SHARDS = 1_000_000

LONG = 100
"""Batches of a stretch."""


def shuffle_statistics(topics: np.ndarray, batch: int) -> dict[str, float | None]:
    """Statistics of topics in the order of reading; 1, 0 and 1 is what a random order has, up to chance.

    Args:
        topics: of each document, in the order of reading, float [documents].
        batch: documents of a batch.

    Returns:
        ``batch_variance``: variance of the batches' means, by that of random batches; ``lag_1``: correlation of the
        means of batches that follow each other; ``stretch_variance``: as the first, of :data:`LONG` batches, None
        where there are fewer than two such stretches; ``lag_1`` is None where the means are all alike.
    """
    means = _means(topics, batch)
    if len(means) < 3:
        raise ValueError(f"{len(topics)} documents are {len(means)} batches of {batch}, but must be at least 3")
    centred = means - means.mean()
    long = _means(topics, batch * LONG)
    population = topics.var()
    return {
        "batch_variance": float(means.var(ddof=1) * batch / population),
        "lag_1": float((centred[1:] * centred[:-1]).sum() / (centred**2).sum()) if centred.any() else None,
        "stretch_variance": float(long.var(ddof=1) * batch * LONG / population) if len(long) > 1 else None,
    }


def _means(topics: np.ndarray, size: int) -> np.ndarray:
    whole = len(topics) // size * size
    return topics[:whole].reshape(-1, size).mean(axis=1)


SHARDS, DOCUMENTS, BATCH, DRAWS = 1024, 128, 64, 100
"""Shards, documents of each, all of the same length; documents a batch; draws of topics, whose mean counts."""


def compare_orders(seed: int = 0) -> list[dict]:
    """Statistics of several orders on data whose shards have a topic each, which is the worst that can be."""
    generator = np.random.default_rng(seed)
    orders = {
        "random": generator.permutation(SHARDS * DOCUMENTS),
        "dcscale, 64 slots, 2 shards": _dcscale(64, 2),
        "dcscale, 64 slots, 8 shards": _dcscale(64, 8),
        "webdataset, shards and a buffer of 1000": _webdataset(1000, seed),
    }
    # Numbers of documents that were scattered over the shards when these were made.
    scattered = generator.permutation(SHARDS * DOCUMENTS)
    orders["dcscale, 64 slots, 2 shards, scattered"] = scattered[orders["dcscale, 64 slots, 2 shards"]]
    found: dict[str, list[dict]] = {name: [] for name in orders}
    for _ in range(DRAWS):
        topics = np.repeat(generator.standard_normal(SHARDS), DOCUMENTS)
        for name, order in orders.items():
            found[name].append(shuffle_statistics(topics[order], BATCH))
    return [
        {"order": name, **{key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}}
        for name, draws in found.items()
    ]


def _dcscale(slots: int, shuffle_shards: int) -> np.ndarray:
    """Numbers of the documents: each is a row, so that a sequence is a document."""
    length = 4
    order = Order(
        [DOCUMENTS * (length + 1)] * SHARDS,
        sequence_length=length,
        slots=slots,
        shuffle_shards=shuffle_shards,
        seed=1,
        rows=True,
    )
    held: dict[int, np.ndarray] = {}
    found = []
    for g in range(order.sequences_per_epoch):
        (piece,) = order.pieces(*order.locate(g))
        if piece.window not in held:
            shards = np.array(order.shards(0, piece.window))
            numbers = (shards[:, None] * DOCUMENTS + np.arange(DOCUMENTS)).reshape(-1)
            held[piece.window] = numbers[order.documents(0, piece.window, len(numbers))]
        found.append(held[piece.window][piece.start // (length + 1)])
    return np.array(found)


def _webdataset(buffer: int, seed: int) -> np.ndarray:
    """The order of webdataset with one worker: shards at random, then its buffer."""
    generator = random.Random(seed)
    shards = list(range(SHARDS))
    generator.shuffle(shards)
    numbers = chain.from_iterable(range(shard * DOCUMENTS, (shard + 1) * DOCUMENTS) for shard in shards)
    shuffled = webdataset.shuffle(buffer, initial=100, rng=generator)(numbers)
    return np.fromiter(shuffled, np.int64)


def planning(shards: int = SHARDS) -> dict[str, Any]:
    """Seconds and memory from the shards' sizes to the place of a sequence.

    The memory is that of the process at its peak, above what it had before.
    """
    sizes = np.random.default_rng(0).integers(1 << 20, 1 << 21, shards).tolist()
    meter.reset_peak()
    before, began = meter.memory_bytes("VmRSS"), time.perf_counter()
    order = Order(sizes, sequence_length=4096, slots=480, shuffle_shards=8, seed=1)
    order.pieces(*order.locate(order.sequences_per_epoch // 2))
    seconds = time.perf_counter() - began
    return {"shards": shards, "seconds": seconds, "bytes": meter.memory_bytes("VmHWM") - before}
