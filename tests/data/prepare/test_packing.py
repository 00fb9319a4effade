"""Packing documents into rows when shards are built."""

import itertools
import time

import numpy as np
import pytest

from dcscale.data import DataError
from dcscale.data.prepare.packing import pack_best_fit, pack_one_per_row


def naive_best_fit(lengths, row_tokens):
    """Best-fit decreasing by looking at every row."""
    rows = []
    fragments = itertools.chain.from_iterable(pack_one_per_row(lengths, row_tokens))
    for fragment in sorted(fragments, key=size, reverse=True):
        fitting = [row for row in rows if sum(map(size, row)) + size(fragment) <= row_tokens]
        if fitting:
            max(fitting, key=lambda row: sum(map(size, row))).append(fragment)
        else:
            rows.append([fragment])
    return rows


def size(fragment):
    return fragment[2] - fragment[1]


def drawn(count, mean, seed=0):
    return np.maximum(2, np.random.default_rng(seed).lognormal(np.log(mean), 1, count)).astype(np.int64)


@pytest.mark.parametrize("pack", [pack_best_fit, pack_one_per_row])
@pytest.mark.parametrize("row_tokens", [2, 3, 17, 65])
def test_every_target_of_a_document_is_in_exactly_one_row(pack, row_tokens):
    lengths = [*drawn(200, 30).tolist(), 1, 2, row_tokens, row_tokens + 1, 2 * row_tokens - 1, 2 * row_tokens]
    targets = []
    for row in pack(lengths, row_tokens):
        assert 1 <= sum(map(size, row)) <= row_tokens
        targets += [(document, i) for document, start, stop in row for i in range(start + 1, stop)]
    assert sorted(targets) == [(document, i) for document, length in enumerate(lengths) for i in range(1, length)]


def test_a_document_that_fits_is_not_cut_and_one_that_does_not_is_cut_as_rarely_as_possible():
    fragments = sorted(itertools.chain.from_iterable(pack_best_fit([8, 9, 15, 16, 1], 8)))
    assert fragments == [(0, 0, 8), (1, 0, 8), (1, 7, 9), (2, 0, 8), (2, 7, 15), (3, 0, 8), (3, 7, 15), (3, 14, 16),
                     (4, 0, 1)]  # fmt: skip


def test_each_fragment_goes_into_the_row_it_fills_best():
    """6 opens a row, 5 another; 3 fills the second and 2 the first."""
    assert pack_best_fit(np.array([2, 6, 3, 5]), 8) == [[(0, 0, 2), (1, 0, 6)], [(2, 0, 3), (3, 0, 5)]]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_as_full_as_those_of_the_naive_implementation(seed):
    lengths = drawn(150, 12, seed)
    found, expected = pack_best_fit(lengths, 33), naive_best_fit(lengths, 33)
    assert sorted(sum(map(size, row)) for row in found) == sorted(sum(map(size, row)) for row in expected)


def test_rows_are_ordered_by_their_first_document():
    rows = pack_best_fit(drawn(500, 20), 65)
    assert rows == sorted(rows)
    assert all(row == sorted(row) for row in rows)


def test_a_hundred_thousand_documents_are_packed_quickly_and_closely():
    lengths = drawn(100_000, 500)
    begin = time.perf_counter()
    rows = pack_best_fit(lengths, 2049)
    assert time.perf_counter() - begin < 10, "measured: 0.6 s"
    assert sum(size(fragment) for row in rows for fragment in row) > 0.99 * len(rows) * 2049


@pytest.mark.parametrize("pack", [pack_best_fit, pack_one_per_row])
@pytest.mark.parametrize(
    ("lengths", "row_tokens", "message"),
    [([3], 1, "row_tokens is 1, but must be at least 2"), ([3, 0], 8, "document 1 has 0 tokens")],
)
def test_sizes_out_of_range_are_refused(pack, lengths, row_tokens, message):
    with pytest.raises(DataError, match=message):
        pack(lengths, row_tokens)
