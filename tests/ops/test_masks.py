import pytest
import torch

from dcscale.ops.masks import band, key_range, most_keys, visible_keys, visible_pairs

CPU = torch.device("cpu")
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5, 9]])
RANGES = [(range(10), range(10)), (range(4, 7), range(10)), (range(9, 10), range(10)), (range(6, 8), range(3, 8))]


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 3, 10, 99])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("queries", "keys"), RANGES)
def test_the_mask_equals_the_definition(queries, keys, causal, window, documents):
    rows = range(1 if documents is None else 2)
    expected = torch.zeros(len(rows), len(queries), len(keys), dtype=torch.bool)
    for row in rows:
        for i, query in enumerate(queries):
            for j, key in enumerate(keys):
                in_window = window is None or abs(query - key) < window
                in_document = documents is None or documents[row, query] == documents[row, key]
                expected[row, i, j] = (key <= query or not causal) and in_window and in_document
    seen = visible_keys(queries, keys, window, causal, documents, CPU)
    if seen is None:
        assert expected.all()
    else:
        assert torch.equal(seen.expand_as(expected), expected)


def test_there_is_no_mask_if_all_keys_are_visible():
    assert visible_keys(range(9, 10), range(10), None, True, None, CPU) is None
    assert visible_keys(range(9, 10), range(7, 10), 3, True, None, CPU) is None
    assert visible_keys(range(9, 10), range(6, 10), 3, True, None, CPU) is not None
    assert visible_keys(range(30), range(10), None, False, None, CPU) is None
    assert visible_keys(range(4, 6), range(3, 7), 3, False, None, CPU) is None
    assert visible_keys(range(4, 6), range(3, 8), 3, False, None, CPU) is not None


def test_the_band_around_a_query():
    assert band(None, causal=True) == (None, 0)
    assert band(3, causal=True) == (2, 0)
    assert band(3, causal=False) == (2, 2)
    assert band(None, causal=False) == (None, None)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_key_range_is_the_smallest_with_all_visible_keys(window, causal):
    for first in range(10):
        for last in range(first, 10):
            seen = visible_keys(range(first, last + 1), range(12), window, causal, None, CPU)
            columns = range(12) if seen is None else seen.any(0).nonzero().flatten().tolist()
            assert key_range(first, last, window, causal, 12) == (columns[0], columns[-1] + 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_most_keys_is_the_longest_range_of_a_chunk(window, causal):
    queries = range(2, 10)
    ranges = [key_range(first, last, window, causal, 11) for first, last in ((2, 4), (5, 7), (8, 9))]
    assert most_keys(queries, 3, window, causal, 11) == max(end - start for start, end in ranges)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 1, 3, 9, 10, 99])
def test_visible_pairs_counts_the_mask(window, causal):
    seen = visible_keys(range(10), range(10), window, causal, None, CPU)
    assert visible_pairs(10, window, causal) == (100 if seen is None else seen.sum())
