"""Mixtures, by brute force: shares exact in every prefix, epochs exact for every source, slots that read forward."""

from __future__ import annotations

import json
import math
import random
from fractions import Fraction

import numpy as np
import pytest

from dcscale.config import DataSource
from dcscale.data import BatchLoader, DataError, StreamConfig, open_stream
from dcscale.data.stream.mixture import (
    MAX_PATTERN,
    MIXTURE_VERSION,
    MixedPlanner,
    integer_weights,
    mixture_pattern,
    open_mixture,
)
from dcscale.data.stream.order import Order
from dcscale.testing.runs import numbered_shards, packed_shards, write_token_shards

WEIGHTS = [
    *([1], [1, 1], [3, 3, 3], [0.7, 0.2, 0.1], [0.5, 0.25, 0.125, 0.125], [0.9, 0.1], [1, 2, 3, 4, 5, 6]),
    *([0.001, 0.999], [0.9999, 0.0001], [0.333, 0.333, 0.334], [1e-5, 1], [123456789, 987654], [math.pi, math.e, 1]),
    *([1] * 20, [100, *[1] * 20]),
]
DRAWN = [[round(random.Random(seed).uniform(0.01, 1), 2) for _ in range(2 + seed % 7)] for seed in range(20)]


def planner_of(weights: list[int], sizes: list[int], slots: int) -> MixedPlanner:
    """A planner of sources with these numbers of sequences per epoch."""
    settings = {"sequence_length": 1, "shuffle_shards": 1, "seed": 0}
    return MixedPlanner([Order([size + 1], **settings) for size in sizes], weights, slots)


def locations(planner: MixedPlanner, numbers) -> list[tuple[int, int, int]]:
    """(source, epoch, index) of each sequence number."""
    location = planner.locate(np.array(numbers))
    return list(zip(location.source_N.tolist(), location.epoch_N.tolist(), location.index_N.tolist()))


@pytest.mark.parametrize("weights", [*WEIGHTS, *DRAWN], ids=str)
def test_every_prefix_has_each_sources_share_to_within_one(weights):
    integers = integer_weights(weights)
    planner = planner_of(integers, [7] * len(integers), slots=6)
    period, limit = sum(integers), Fraction(1) - Fraction(1, max(2 * len(integers) - 2, 1))
    sources = np.tile(planner.pattern_P, 2)
    found = planner.locate(np.arange(2 * period, 2 * period + 60)).source_N
    assert found.tolist() == np.resize(sources, 60).tolist()
    for source, weight in enumerate(integers):
        counts = np.cumsum(sources == source)
        expected = np.arange(1, len(sources) + 1) * weight
        assert np.abs(counts * period - expected).max() <= limit * period
        assert [planner.count(source, n) for n in range(0, len(sources) + 1, 17)] == [0, *counts[16::17].tolist()]
    assert np.bincount(planner.pattern_P).tolist() == integers


def test_weights_of_four_decimals_are_exact_and_others_nearly():
    assert integer_weights([0.7, 0.2, 0.1]) == [7, 2, 1]
    assert integer_weights([2.0, 1, 1e-0]) == [2, 1, 1]
    assert integer_weights([0.1234, 0.8766]) == [617, 4383]
    assert integer_weights([math.pi, 1]) == [7585, 2415]
    assert integer_weights([1e-9, 1]) == [1, 10_000], "the smallest share is one, not none"
    assert all(
        abs(integer / sum(integers) - weight / sum(weights)) < 2 * len(weights) / MAX_PATTERN
        for weights in WEIGHTS
        for integers in [integer_weights(weights)]
        for integer, weight in zip(integers, weights)
    )


ORDERS = {
    "common factors with the slots": ([7, 2, 1], [23, 40, 5], 6),
    "each slot of one source": ([1, 1], [17, 50], 4),
    "no common factor": ([5, 2], [31, 9], 6),
    "one slot": ([3, 2], [10, 7], 1),
    "fewer sequences than slots": ([2, 3, 2], [1, 2, 11], 8),
    "one source": ([1], [29], 6),
}


@pytest.mark.parametrize(("weights", "sizes", "slots"), ORDERS.values(), ids=ORDERS)
def test_each_source_uses_every_sequence_once_per_epoch_and_slots_read_forward(weights, sizes, slots):
    planner = planner_of(weights, sizes, slots)
    seen = [[] for _ in weights]
    of_slot = {}
    count = 4 * max(size * sum(weights) // weight for size, weight in zip(sizes, weights))
    for g, (source, epoch, index) in enumerate(locations(planner, range(count))):
        seen[source].append((epoch, index))
        before = of_slot.get((source, g % slots))
        if before is not None and before[0] == epoch:
            assert index == before[1] + 1, "a slot continues where it was"
        of_slot[source, g % slots] = epoch, index
    for size, found in zip(sizes, seen):
        assert len(found) > 3 * size
        for epoch in range(len(found) // size):
            assert sorted(found[epoch * size : (epoch + 1) * size]) == [(epoch, i) for i in range(size)]


def test_the_order_of_a_mixture_is_frozen():
    """These numbers may never change: runs are resumed by them. A new order needs a new MIXTURE_VERSION."""
    assert MIXTURE_VERSION == 1
    assert mixture_pattern([7, 2, 1]).tolist() == [0, 0, 1, 0, 0, 2, 0, 0, 1, 0]
    assert locations(planner_of([7, 2, 1], [23, 40, 5], 6), [0, 2, 17, 48, 1000]) == [
        *((0, 0, 0), (1, 0, 14), (0, 0, 20), (1, 0, 3), (0, 30, 17)),
    ]


def test_far_positions_and_many_sources_are_placed_quickly():
    planner = planner_of(integer_weights([1 + i / 100 for i in range(50)]), [10**7 + i for i in range(50)], 480)
    assert planner.locate(np.array([10**12])).epoch_N > 0


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    """Two plain sources and one of packed rows, with tokens that identify their shard and position."""
    root = tmp_path_factory.mktemp("mixture")
    sizes = {"web": [130, 61, 97, 180, 45, 122], "code": [40, 77, 52]}
    for name, shard_sizes in sizes.items():
        write_token_shards(root / name, numbered_shards(shard_sizes, seed=len(name)), vocab_size=5000)
    rows = packed_shards(numbered_shards([60, 90, 33], seed=1), 9, eos_id=4999)
    write_token_shards(root / "rows", rows, vocab_size=5000, row_tokens=9)
    return root


SOURCES = [("web", 0.6), ("code", 0.3), ("rows", 0.1)]
SETTINGS = {"vocab_size": 5000, "sequence_length": 8, "seed": 3, "shuffle_shards": 2, "slots": 6}
SETTINGS |= {"document_mask": True, "verify": True}


def mixture_of(root, sources=SOURCES, **changes):
    found = [DataSource(name, str(root / name), weight) for name, weight in sources]
    return open_mixture(found, StreamConfig(**{**SETTINGS, **changes}))


def bytes_of(rows):
    parts = (rows.tokens_NL1, rows.targets_NL, rows.document_ids_NL)
    return [b"".join(part[i].tobytes() for part in parts) for i in range(len(rows.targets_NL))]


def test_every_source_has_the_sequences_of_its_own_epochs(roots):
    mixture = mixture_of(roots)
    numbers = range(1500)
    sequences = mixture.sequences(numbers)
    found = bytes_of(sequences)
    source_of = mixture.planner.locate(np.array(numbers)).source_N
    padded = [np.count_nonzero(sequences.padding_N[source_of == source]) for source in range(3)]
    web, code, packed = map(math.ceil, mixture.epochs(1500).values())
    assert padded[0] <= web, "only the last sequence of an epoch"
    assert padded[1] <= code
    assert padded[2] > 2 * packed
    for source, (name, _) in enumerate(SOURCES):
        alone = open_stream(roots / name, StreamConfig(source_number=source, **SETTINGS))
        n = alone.sequences_per_epoch
        rows = [row for row, of in zip(found, source_of) if of == source]
        assert len(rows) > 2 * n
        for epoch in range(len(rows) // n):
            expected = bytes_of(alone.sequences(range(epoch * n, (epoch + 1) * n)))
            assert sorted(rows[epoch * n : (epoch + 1) * n]) == sorted(expected)
        assert mixture.epochs(1500)[name] == len(rows) / n


def test_sequences_do_not_depend_on_what_was_read_before(roots):
    forward = bytes_of(mixture_of(roots).sequences(range(200)))
    backward = mixture_of(roots)
    assert [bytes_of(backward.sequences([g]))[0] for g in reversed(range(200))] == forward[::-1]
    assert bytes_of(mixture_of(roots).reopen().sequences(range(200))) == forward
    padding = backward.sequences([None])
    assert (padding.targets_NL == -100).all()
    assert padding.padding_N.tolist() == [8]


def test_reading_stays_within_the_bound_of_its_sources(tmp_path):
    """Each block is read once per epoch of its source, and once more for each run that begins in it."""
    for name in ("a", "b"):
        write_token_shards(tmp_path / name, numbered_shards([100] * 24), vocab_size=5000)
    for ranks in (1, 2, 3, 6):
        shards = 0
        for rank in range(ranks):
            mixture = mixture_of(tmp_path, [("a", 0.7), ("b", 0.3)])
            for g in range(rank, 300, ranks):
                mixture.sequences([g])
            for source in mixture.sources:
                assert len(source.blocks._prefetcher) <= 6 // ranks
            shards += mixture.shards_read
        epochs = mixture.epochs(300).values()
        assert 0.2 < min(epochs) <= max(epochs) < 1
        assert shards <= sum(math.ceil(24 * epoch) for epoch in epochs) + 2 * 2 * 6 + 2 * 2


def test_fingerprint_follows_sources_weights_and_order_but_not_names(roots, tmp_path):
    base = mixture_of(roots)
    assert json.loads(json.dumps(base.identity)) == base.identity
    assert base.identity["weights"] == [6, 3, 1]
    (tmp_path / "other").symlink_to(roots / "web")
    same = [
        DataSource("x", str(tmp_path / "other"), 6),
        *[DataSource(n, str(roots / n), w * 10) for n, w in SOURCES[1:]],
    ]
    assert open_mixture(same, StreamConfig(**SETTINGS)).fingerprint == base.fingerprint
    others = [
        mixture_of(roots, SOURCES[::-1]),
        mixture_of(roots, SOURCES[:2]),
        mixture_of(roots, [("web", 0.5), *SOURCES[1:]]),
        mixture_of(roots, seed=4),
        mixture_of(roots, slots=5),
        open_stream(roots / "web", StreamConfig(**SETTINGS)),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 7


def test_two_sources_of_one_folder_have_different_orders(roots):
    mixture = mixture_of(roots, [("code", 0.5), ("code", 0.5)])
    n = mixture.sources[0].order.sequences_per_epoch
    found = bytes_of(mixture.sequences(range(2 * n)))
    sources = mixture.planner.locate(np.arange(2 * n)).source_N
    of = [[row for row, source in zip(found, sources) if source == s] for s in (0, 1)]
    assert of[0] != of[1]


def test_another_tokenizer_is_refused(roots, tmp_path):
    write_token_shards(tmp_path / "small", [[[1, 2, 3, 4, 5, 6, 7, 8, 9, 256]]], vocab_size=300)
    sources = [DataSource("web", str(roots / "web"), 1), DataSource("small", str(tmp_path / "small"), 1)]
    with pytest.raises(DataError, match=r"small: its tokenizer is .*vocab_size=300.* need the same"):
        open_mixture(sources, StreamConfig(**SETTINGS))


@pytest.mark.parametrize("weight", [0, -1, math.inf, math.nan])
def test_weights_out_of_range_are_refused(roots, weight):
    with pytest.raises(DataError, match=r"the weight of source code is .*must be a number above 0"):
        mixture_of(roots, [("web", 1), ("code", weight)])


def test_a_mixture_has_no_limit(roots):
    sizes = {"global_batch_size": 2, "micro_batch_size": 1, "rank": 0, "world_size": 1}
    with pytest.raises(DataError, match="limit is 10, but a mixture has no epoch"):
        BatchLoader(mixture_of(roots), **sizes, limit=10)


def test_negative_numbers_are_refused(roots):
    with pytest.raises(DataError, match="-1 must not be negative"):
        mixture_of(roots).sequences([-1])


def test_the_shards_of_every_source_are_checked(roots, tmp_path):
    write_token_shards(tmp_path / "web", numbered_shards([60] * 3), vocab_size=5000)
    (tmp_path / "web" / "shard-001.tar").unlink()
    mixture = open_mixture(
        [DataSource("code", str(roots / "code")), DataSource("web", str(tmp_path / "web"))], StreamConfig(**SETTINGS)
    )
    mixture.check_shard_files(0, 3)
    with pytest.raises(DataError, match=r"web/shard-001\.tar"):
        mixture.check_shard_files(1, 3)
