"""The order against a naive second implementation, which builds lists instead of computing positions."""

import functools
import operator

import numpy as np
import pytest

from dcscale.data.stream.order import ORDER_VERSION, Order, SinglePlanner, permutation

CASES = {
    "several blocks": {
        "shard_tokens": [40, 17, 33, 29, 51, 8, 23],
        "sequence_length": 8,
        "slots": 3,
        "shuffle_shards": 2,
    },
    "shards smaller than a sequence": {
        "shard_tokens": [3, 2, 5, 1, 4, 2, 3],
        "sequence_length": 9,
        "slots": 2,
        "shuffle_shards": 2,
    },
    "one shard": {"shard_tokens": [100], "sequence_length": 7, "slots": 4, "shuffle_shards": 8},
    "fewer sequences than slots": {"shard_tokens": [20, 21], "sequence_length": 10, "slots": 48, "shuffle_shards": 1},
    "exactly one sequence": {"shard_tokens": [6, 5], "sequence_length": 10, "slots": 2, "shuffle_shards": 1},
    "no remainder": {"shard_tokens": [33, 32], "sequence_length": 8, "slots": 4, "shuffle_shards": 1},
}


def planner_of(shard_tokens: list[int], *, slots: int, **settings) -> SinglePlanner:
    return SinglePlanner(Order(shard_tokens, **settings), slots)


def positions(planner: SinglePlanner, *numbers: int) -> list[tuple[int, int]]:
    """(epoch, index) of sequence numbers."""
    location = planner.locate(np.array(numbers))
    return list(zip(location.epoch_N.tolist(), location.index_N.tolist()))


def naive_epoch(
    order: Order, epoch: int, shard_tokens: list[int], length: int, slots: int
) -> list[list[tuple[int, int]]]:
    """The epoch's sequences in the order of their numbers; a token is (block, offset in it)."""
    tokens, block = [], 0
    while shards := order.shards((epoch, block)):
        tokens += [(block, i) for i in range(sum(shard_tokens[shard] for shard in shards))]
        block += 1
    sequences, start = [], 0
    while start < len(tokens) - 1:
        sequences.append(tokens[start : start + length + 1])
        start += length
    runs: list[list] = [[] for _ in range(slots)]
    for _ in sequences:  # deal out the lengths of the runs, first run first, then fill the runs in order
        min(runs, key=len).append(None)
    remaining = iter(sequences)
    runs = [[next(remaining) for _ in run] for run in runs]
    return [run[row] for row in range(max(map(len, runs))) for run in runs if row < len(run)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_positions_are_those_of_the_naive_order(case):
    planner, number = planner_of(**case, seed=5), 0
    (order,) = planner.orders
    for epoch in range(3):
        expected = naive_epoch(order, epoch, case["shard_tokens"], case["sequence_length"], case["slots"])
        assert len(expected) == order.sequences_per_epoch
        for sequence in expected:
            placements = planner.placements_of(number)
            assert {placement.block.epoch for placement in placements} == {epoch}
            assert [(p.block.index, i) for p in placements for i in range(p.start, p.stop)] == sequence
            assert [p.column for p in placements] == [
                sum(p.stop - p.start for p in placements[:i]) for i in range(len(placements))
            ]
            number += 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_shard_is_in_exactly_one_block_per_epoch(case):
    (order,) = planner_of(**case, seed=1).orders
    for epoch in range(3):
        blocks = [order.shards((epoch, b)) for b in range(len(case["shard_tokens"]) + 1)]
        assert sorted(functools.reduce(operator.iadd, blocks, [])) == list(range(len(case["shard_tokens"])))
        assert max(map(len, blocks)) <= case["shuffle_shards"]


def test_epochs_seeds_sources_and_blocks_have_different_orders():
    settings = {"shard_tokens": [10] * 50, "sequence_length": 4, "shuffle_shards": 50}
    order = Order(**settings, seed=1)
    orders = [order.shards((0, 0)), order.shards((1, 0))]
    orders += [Order(**settings, seed=2).shards((0, 0)), Order(**settings, seed=1, source_number=1).shards((0, 0))]
    orders += [order.document_order(block, 50).tolist() for block in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(found) for found in orders}) == len(orders)
    assert all(sorted(found) == list(range(50)) for found in orders)


def test_without_shuffle_everything_stays_in_place():
    planner = planner_of([10, 20, 30], sequence_length=6, slots=1, shuffle_shards=1, seed=3, shuffle=False)
    (order,) = planner.orders
    assert [order.shards((epoch, 1)) for epoch in (0, 5)] == [[1], [1]]
    assert order.document_order((4, 2), 5).tolist() == [0, 1, 2, 3, 4]
    assert positions(planner, 0, 9, 10, 11) == [(0, 0), (0, 9), (1, 0), (1, 1)]


def test_slots_start_far_apart():
    planner = planner_of([1000] * 10, sequence_length=10, slots=10, shuffle_shards=1, seed=0)
    assert positions(planner, *range(10)) == [(0, slot * 100) for slot in range(10)]


def test_a_slot_reads_one_run_forward_in_each_epoch():
    """Also where the sequences of an epoch are no multiple of the slots: which run a slot reads then changes."""
    planner = planner_of([40, 17, 33, 29, 51, 8, 23], sequence_length=8, slots=3, shuffle_shards=2, seed=5)
    sequences = planner.orders[0].sequences_per_epoch
    assert sequences % 3
    location = planner.locate(np.arange(4 * sequences))
    assert (location.slot_N == np.arange(4 * sequences) % 3).all()
    for slot in range(3):
        for epoch in range(4):
            index_n = location.index_N[(location.slot_N == slot) & (location.epoch_N == epoch)]
            assert (np.diff(index_n) == 1).all()


def test_sequences_of_a_slot_in_one_block_share_a_placement():
    planner = planner_of([400, 400], sequence_length=10, slots=2, shuffle_shards=1, seed=0)
    rows = np.arange(24)
    placements = list(planner.placements(planner.locate(rows), rows // 12, rows % 12))
    assert [(group, placement.slot, placement.rows_n.tolist()) for group, placement in placements] == [
        (group, slot, list(range(slot, 12, 2))) for group in (0, 1) for slot in (0, 1)
    ]


def test_plans_a_trillion_tokens_from_token_counts_alone():
    planner = planner_of([1_600_000] * 100_000, sequence_length=2048, slots=480, shuffle_shards=8, seed=0)
    sequences = planner.orders[0].sequences_per_epoch
    last = sequences // 480 * 480 - 1  # the end of the last run
    assert positions(planner, last) == [(0, sequences - 1)]
    assert sum(p.stop - p.start for p in planner.placements_of(10**7)) == 2049
    assert sum(p.stop - p.start for p in planner.placements_of(last)) == 1_600_000 * 100_000 - (sequences - 1) * 2048


def test_order_is_frozen():
    """These numbers may never change: runs are resumed by them. A new order needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert permutation(10, "shards", 0, 0, 0).tolist() == [3, 1, 9, 0, 5, 8, 2, 4, 6, 7]
    assert permutation(10, "documents", 7, 0, 1, 2).tolist() == [9, 3, 6, 7, 2, 8, 4, 0, 1, 5]
    planner = planner_of([40, 17, 33, 29, 51, 8, 23], sequence_length=8, slots=3, shuffle_shards=2, seed=5)
    assert [[(p.block.index, p.start, p.stop) for p in planner.placements_of(g)] for g in (0, 7, 26)] == [
        [(0, 0, 9)],
        [(1, 51, 60)],
        [(0, 72, 73), (1, 0, 8)],
    ]


def test_permutation_takes_numpy_integers_like_python_ones():
    assert (permutation(20, "x", np.int64(3)) == permutation(20, "x", 3)).all()


def test_permutations_are_even():
    """Each of the 24 permutations of 4 occurs about equally often: within 5 standard deviations of a binomial."""
    counts: dict[tuple, int] = {}
    trials = 4800
    for seed in range(trials):
        found = tuple(permutation(4, "evenness", seed).tolist())
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 24
    assert max(abs(count - trials / 24) for count in counts.values()) < 5 * (trials / 24 * 23 / 24) ** 0.5
