import itertools

import pytest
import torch

from dcscale.ops import ComposeWeights, identity_distance
from dcscale.ops.compose.reference import compose
from dcscale.testing.attention import arguments, random_inputs


def distance_by_definition(weights):
    """From the H x H matrix of every token, built from compose of one-hot scores."""
    heads = next(iter(weights.tensors().values())).shape[-1]
    batch, tokens = next(iter(weights.tensors().values())).shape[:2]
    squares = torch.zeros(batch, tokens, dtype=torch.float64)
    for head in range(heads):
        onehot_BHTT = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
        onehot_BHTT[:, head] = 1
        column_BHT = (compose(onehot_BHTT, weights) - onehot_BHTT).diagonal(dim1=2, dim2=3)
        squares += column_BHT.square().sum(1)
    return (squares.mean() / heads).sqrt()


@pytest.mark.parametrize("present", [p for p in itertools.product((False, True), repeat=6) if any(p)])
def test_distance_equals_the_definition(present):
    weights = arguments(random_inputs(queries=3, heads=5, rank=3).tensors)[3]
    weights = ComposeWeights(*(w if there else None for w, there in zip(weights, present)))
    result = identity_distance(weights)
    assert result.dtype == torch.float32
    assert result.shape == ()
    torch.testing.assert_close(result.double(), distance_by_definition(weights), rtol=1e-6, atol=0)


def test_distance_of_known_weights():
    assert identity_distance(ComposeWeights()) == 0
    half = torch.full((2, 3, 4), 0.5)
    assert identity_distance(ComposeWeights(qg=half)) == 0.5
    assert identity_distance(ComposeWeights(qg=half, kg=half)) == 1
    assert identity_distance(ComposeWeights(qg=half, kg=-half)) == 0
    rows = torch.ones(1, 1, 1, 4)
    assert identity_distance(ComposeWeights(k1=rows, k2=rows)) == 2  # 4 x 4 ones: norm 4, over sqrt(4)


def test_distance_of_cancelling_terms_is_not_nan():
    weights = arguments(random_inputs(queries=50, heads=8).tensors)[3]
    weights = weights._replace(k1=weights.q1, k2=-weights.q2, kg=-weights.qg)
    assert identity_distance(weights) < 1e-2


def test_distance_in_bfloat16_is_computed_in_float32():
    weights = arguments(random_inputs(queries=9).tensors)[3]
    narrow = ComposeWeights(*(w.bfloat16() for w in weights))
    torch.testing.assert_close(identity_distance(narrow), identity_distance(weights))


def test_distance_needs_queries_and_keys_at_the_same_positions():
    weights = ComposeWeights(qg=torch.zeros(1, 2, 4), kg=torch.zeros(1, 3, 4))
    with pytest.raises(ValueError, match=r"as many queries as keys, got weights of shapes .*\(1, 3, 4\)"):
        identity_distance(weights)


def test_tensors_by_name():
    gate = torch.zeros(1, 2, 4)
    assert ComposeWeights(qg=gate).tensors() == {"qg": gate}
    assert list(ComposeWeights(*[gate] * 6).tensors()) == ["q1", "q2", "qg", "k1", "k2", "kg"]
