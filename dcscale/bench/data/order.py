"""The order of sequences: how well it shuffles, and the cost of planning a very large epoch.

Shuffling is measured on documents with a known topic, a number from a standard normal distribution that neighbouring
documents share, as in a web crawl. An order is as good as random if the mean topic of a batch varies as much as that of
randomly drawn documents, and the means of consecutive batches are uncorrelated.
"""

from __future__ import annotations

import random
import time
from itertools import chain
from typing import Any

import numpy as np
import webdataset

from dcscale.bench import meter
from dcscale.data.stream.order import BlockKey, Order, SinglePlanner

LONG = 100
"""Batches of a stretch of the order."""


def shuffle_statistics(topics: np.ndarray, batch: int) -> dict[str, float | None]:
    """Statistics of topics in reading order; a random order has 1, 0 and 1, up to chance.

    Args:
        topics: of each document, in reading order, float [documents].
        batch: documents of a batch.

    Returns:
        ``batch_variance``: variance of the batches' means, relative to that of random batches. ``lag_1``: correlation
        of the means of consecutive batches; None if all means are equal. ``stretch_variance``: as ``batch_variance``,
        of stretches of :data:`LONG` batches; None if there are fewer than two of them.

    Raises:
        ValueError: there are fewer than 3 batches.
    """
    means = _means(topics, batch)
    if len(means) < 3:
        raise ValueError(f"{len(topics)} documents are {len(means)} batches of {batch}, expected at least 3")
    centred = means - means.mean()
    long = _means(topics, batch * LONG)
    population = topics.var()
    # The mean of n independent topics has the variance population / n.
    return {
        "batch_variance": float(means.var(ddof=1) * batch / population),
        "lag_1": float((centred[1:] * centred[:-1]).sum() / (centred**2).sum()) if centred.any() else None,
        "stretch_variance": float(long.var(ddof=1) * batch * LONG / population) if len(long) > 1 else None,
    }


def _means(topics: np.ndarray, size: int) -> np.ndarray:
    used = len(topics) // size * size
    return topics[:used].reshape(-1, size).mean(axis=1)


BATCH, DRAWS = 64, 100
"""Documents of a batch; draws of topics that are averaged."""


def compare_orders(shards: int, *, documents: int = 128, seed: int = 0) -> list[dict]:
    """Statistics of several orders for the worst case: all documents of a shard have the same topic.

    Args:
        shards: number of shards.
        documents: documents of each shard, all of the same length.
        seed: seed of the topics and of all orders but dcscale's.
    """
    generator = np.random.default_rng(seed)
    # Each order is a permutation of the document numbers.
    orders = {
        "random": generator.permutation(shards * documents),
        "dcscale, 64 slots, 2 shards": _dcscale(shards, documents, 64, 2),
        "dcscale, 64 slots, 8 shards": _dcscale(shards, documents, 64, 8),
        "webdataset, shards and a buffer of 1000": _webdataset(shards, documents, 1000, seed),
    }
    # As if the documents had been shuffled when the shards were written.
    shuffled = generator.permutation(shards * documents)
    orders["dcscale, 64 slots, 2 shards, shuffled shards"] = shuffled[orders["dcscale, 64 slots, 2 shards"]]
    found: dict[str, list[dict]] = {name: [] for name in orders}
    for _ in range(DRAWS):
        topics = np.repeat(generator.standard_normal(shards), documents)
        for name, order in orders.items():
            found[name].append(shuffle_statistics(topics[order], BATCH))
    return [
        {"order": name, **{key: float(np.mean([draw[key] for draw in draws])) for key in draws[0]}}
        for name, draws in found.items()
    ]


def _dcscale(shards: int, documents: int, slots: int, shuffle_shards: int) -> np.ndarray:
    """Document numbers in dcscale's order, with documents of one row each, so that a sequence is a document."""
    length = 4
    order = Order(
        [documents * (length + 1)] * shards,
        sequence_length=length,
        shuffle_shards=shuffle_shards,
        seed=1,
        rows=True,
    )
    planner = SinglePlanner(order, slots)
    blocks: dict[BlockKey, np.ndarray] = {}
    found = []
    for g in range(order.sequences_per_epoch):
        (placement,) = planner.placements_of(g)
        block = placement.block
        if block not in blocks:
            block_shards = np.array(order.shards(block))
            numbers = (block_shards[:, None] * documents + np.arange(documents)).reshape(-1)
            blocks[block] = numbers[order.document_order(block, len(numbers))]
        found.append(blocks[block][placement.start // (length + 1)])
    return np.array(found)


def _webdataset(shards: int, documents: int, buffer: int, seed: int) -> np.ndarray:
    """Document numbers in webdataset's order with one worker: shuffled shards, then a shuffle buffer."""
    generator = random.Random(seed)
    shuffled_shards = list(range(shards))
    generator.shuffle(shuffled_shards)
    numbers = chain.from_iterable(range(shard * documents, (shard + 1) * documents) for shard in shuffled_shards)
    shuffled = webdataset.shuffle(buffer, initial=100, rng=generator)(numbers)
    return np.fromiter(shuffled, np.int64)


def planning(shards: int) -> dict[str, Any]:
    """Seconds, and peak memory above what the process had before, to locate a sequence given the shards' sizes."""
    sizes = np.random.default_rng(0).integers(1 << 20, 1 << 21, shards).tolist()
    meter.reset_peak()
    before, began = meter.memory_bytes("VmRSS"), time.perf_counter()
    order = Order(sizes, sequence_length=4096, shuffle_shards=8, seed=1)
    SinglePlanner(order, slots=480).placements_of(order.sequences_per_epoch // 2)
    seconds = time.perf_counter() - began
    return {"shards": shards, "seconds": seconds, "bytes": meter.memory_bytes("VmHWM") - before}
