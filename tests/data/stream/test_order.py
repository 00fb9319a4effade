"""The order against a second, naive statement of it: lists that are built, not computed."""

import functools
import operator

import numpy as np
import pytest

from dcscale.data.stream.order import ORDER_VERSION, Order, permutation

CASES = {
    "several windows": {
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


def naive_epoch(
    order: Order, epoch: int, shard_tokens: list[int], length: int, slots: int
) -> list[list[tuple[int, int]]]:
    """The epoch's sequences in the order of their numbers; a token is (window, offset in it)."""
    tokens, window = [], 0
    while shards := order.shards(epoch, window):
        tokens += [(window, i) for i in range(sum(shard_tokens[shard] for shard in shards))]
        window += 1
    sequences, start = [], 0
    while start < len(tokens) - 1:
        sequences.append(tokens[start : start + length + 1])
        start += length
    runs: list[list] = [[] for _ in range(slots)]
    for _ in sequences:  # deal the lengths of the runs out, first slots first, then fill the runs in order
        min(runs, key=len).append(None)
    remaining = iter(sequences)
    runs = [[next(remaining) for _ in run] for run in runs]
    return [run[row] for row in range(max(map(len, runs))) for run in runs if row < len(run)]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_positions_are_those_of_the_naive_order(case):
    order = Order(**case, seed=5)
    number = 0
    for epoch in range(3):
        expected = naive_epoch(order, epoch, case["shard_tokens"], case["sequence_length"], case["slots"])
        assert len(expected) == order.sequences_per_epoch
        for sequence in expected:
            found_epoch, index = order.locate(number)
            pieces = order.pieces(found_epoch, index)
            assert found_epoch == epoch
            assert [(piece.window, i) for piece in pieces for i in range(piece.start, piece.stop)] == sequence
            number += 1


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_shard_is_in_exactly_one_window_an_epoch(case):
    order = Order(**case, seed=1)
    for epoch in range(3):
        windows = [order.shards(epoch, w) for w in range(len(case["shard_tokens"]) + 1)]
        assert sorted(functools.reduce(operator.iadd, windows, [])) == list(range(len(case["shard_tokens"])))
        assert max(map(len, windows)) <= case["shuffle_shards"]


def test_epochs_seeds_sources_and_windows_have_orders_of_their_own():
    settings = {"shard_tokens": [10] * 50, "sequence_length": 4, "slots": 1, "shuffle_shards": 50}
    order = Order(**settings, seed=1)
    orders = [order.shards(0, 0), order.shards(1, 0)]
    orders += [Order(**settings, seed=2).shards(0, 0), Order(**settings, seed=1, source=1).shards(0, 0)]
    orders += [
        order.documents(0, 0, 50).tolist(),
        order.documents(0, 1, 50).tolist(),
        order.documents(1, 0, 50).tolist(),
    ]
    assert len({tuple(found) for found in orders}) == len(orders)
    assert all(sorted(found) == list(range(50)) for found in orders)


def test_without_shuffle_everything_stays_in_place():
    order = Order([10, 20, 30], sequence_length=6, slots=1, shuffle_shards=1, seed=3, shuffle=False)
    assert [order.shards(epoch, 1) for epoch in (0, 5)] == [[1], [1]]
    assert order.documents(4, 2, 5).tolist() == [0, 1, 2, 3, 4]
    assert [order.locate(g) for g in (0, 9, 10, 11)] == [(0, 0), (0, 9), (1, 0), (1, 1)]


def test_slots_start_far_apart():
    order = Order([1000] * 10, sequence_length=10, slots=10, shuffle_shards=1, seed=0)
    starts = [order.locate(g)[1] for g in range(10)]
    assert starts == [slot * 100 for slot in range(10)]


def test_plans_a_trillion_tokens_from_token_counts_alone():
    order = Order([1_600_000] * 100_000, sequence_length=2048, slots=480, shuffle_shards=8, seed=0)
    last = order.sequences_per_epoch - 1
    assert sum(piece.stop - piece.start for piece in order.pieces(*order.locate(10**7))) == 2049
    assert sum(piece.stop - piece.start for piece in order.pieces(0, last)) == 1_600_000 * 100_000 - last * 2048


def test_order_is_frozen():
    """These numbers may never change: runs are resumed by them. A new order needs a new ORDER_VERSION."""
    assert ORDER_VERSION == 1
    assert permutation(10, "shards", 0, 0, 0).tolist() == [3, 1, 9, 0, 5, 8, 2, 4, 6, 7]
    assert permutation(10, "documents", 7, 0, 1, 2).tolist() == [9, 3, 6, 7, 2, 8, 4, 0, 1, 5]
    order = Order([40, 17, 33, 29, 51, 8, 23], sequence_length=8, slots=3, shuffle_shards=2, seed=5)
    assert [order.pieces(*order.locate(g)) for g in (0, 7, 26)] == [
        [(0, 0, 9)],
        [(1, 51, 60)],
        [(0, 72, 73), (1, 0, 8)],
    ]


def test_permutation_takes_numpy_integers_like_python_ones():
    assert (permutation(20, "x", np.int64(3)) == permutation(20, "x", 3)).all()


def test_permutations_are_even():
    """Each of the 24 permutations of 4 comes up about equally often: within 5 standard deviations of a binomial."""
    counts: dict[tuple, int] = {}
    trials = 4800
    for seed in range(trials):
        found = tuple(permutation(4, "evenness", seed).tolist())
        counts[found] = counts.get(found, 0) + 1
    assert len(counts) == 24
    assert max(abs(count - trials / 24) for count in counts.values()) < 5 * (trials / 24 * 23 / 24) ** 0.5
