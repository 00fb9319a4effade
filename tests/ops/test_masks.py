import pytest
import torch

from dcscale.ops.masks import key_range, visible_keys, visible_pairs

DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2, 2], [5, 5, 5, 5, 5, 5, 5, 5, 5, 9]])
RANGES = [(range(10), range(10)), (range(4, 7), range(10)), (range(9, 10), range(10)), (range(6, 8), range(3, 8))]


@pytest.mark.parametrize("documents", [None, DOCUMENTS])
@pytest.mark.parametrize("window", [None, 1, 3, 10, 99])
@pytest.mark.parametrize(("queries", "keys"), RANGES)
def test_the_mask_equals_the_definition(queries, keys, window, documents):
    rows = range(1 if documents is None else 2)
    expected = torch.zeros(len(rows), len(queries), len(keys), dtype=torch.bool)
    for row in rows:
        for i, query in enumerate(queries):
            for j, key in enumerate(keys):
                in_window = window is None or query - window < key
                in_document = documents is None or documents[row, query] == documents[row, key]
                expected[row, i, j] = key <= query and in_window and in_document
    seen = visible_keys(queries, keys, window, documents, torch.device("cpu"))
    if seen is None:
        assert expected.all()
    else:
        assert torch.equal(seen.expand_as(expected), expected)


def test_there_is_no_mask_if_all_keys_are_visible():
    assert visible_keys(range(9, 10), range(10), None, None, torch.device("cpu")) is None
    assert visible_keys(range(9, 10), range(7, 10), 3, None, torch.device("cpu")) is None
    assert visible_keys(range(9, 10), range(6, 10), 3, None, torch.device("cpu")) is not None


def test_key_range_is_the_smallest_with_all_visible_keys():
    assert key_range(5, 8, None) == (0, 9)
    assert key_range(5, 8, 1) == (5, 9)
    assert key_range(5, 8, 3) == (3, 9)
    assert key_range(5, 8, 100) == (0, 9)


@pytest.mark.parametrize("window", [None, 1, 3, 9, 10, 99])
def test_visible_pairs_counts_the_mask(window):
    seen = visible_keys(range(10), range(10), window, None, torch.device("cpu"))
    assert visible_pairs(10, window) == seen.sum()
