"""Plain attention against the dense definition, and how it calls scaled_dot_product_attention."""

import pytest
import torch

from dcscale.ops import attention
from dcscale.testing.attention import PLAIN_CALLS, WEIGHTS, check_results, random_inputs, unfused_attention


def plain(q, k, v, pre, post, **options):
    assert pre is post is None
    return attention(q, k, v, **options)


@pytest.mark.parametrize("options", PLAIN_CALLS.values(), ids=PLAIN_CALLS)
def test_equals_the_reference_in_float64(options):
    inputs = random_inputs(**options, absent=WEIGHTS)
    expected = inputs.run("reference")
    for name, result in inputs.run_function(plain).items():
        assert (result - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
    assert torch.equal(inputs.run("auto")["out"], inputs.run_function(plain)["out"])


# With one key per query the gradients of q and k are zero, and those of torch's kernel are rounding noise: no baseline.
SEVERAL_KEYS = {name: options for name, options in PLAIN_CALLS.items() if name not in ("one query", "window of one")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SEVERAL_KEYS.values(), ids=SEVERAL_KEYS)
def test_error_in_the_dtypes_of_training(options, dtype):
    inputs = random_inputs(**{**options, "batch": 8}, absent=WEIGHTS)
    narrow = inputs.to(dtype)
    check_results(narrow.run_function(plain), narrow.run_function(unfused_attention), inputs.run("reference"))


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every call of scaled_dot_product_attention."""
    made = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recording(q, k, v, **options):
        made.append((q, k, options))
        return original(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recording)
    return made


@pytest.mark.parametrize("options", [{}, {"window": 20}, {"keys": 30, "query_offset": 0}, {"kv_heads": 2}])
def test_full_causal_attention_is_one_call_without_a_mask(options, calls):
    random_inputs(queries=20, **options, absent=WEIGHTS).run_function(plain)
    ((_, _, made),) = calls
    assert made["is_causal"]
    assert made["attn_mask"] is None


def test_the_cost_of_a_window_is_its_width(calls):
    queries, window = 1024, 64
    random_inputs(batch=1, queries=queries, window=window, absent=WEIGHTS).run_function(plain)
    scores = sum(q.shape[2] * k.shape[2] for q, k, _ in calls)
    assert scores <= queries * (window + 128 - 1)


def test_masks_do_not_grow_with_the_square_of_the_length(calls):
    random_inputs(batch=1, queries=1200, heads=1, documents=100, absent=WEIGHTS).run_function(plain)
    assert max(made["attn_mask"].numel() for _, _, made in calls) <= 512 * 1200


@pytest.mark.parametrize(("causal", "after"), [(True, 15), (False, 19)])
def test_keys_that_no_query_sees_are_not_accessed(causal, after):
    """Positions 0..4 are before every window, those from ``after`` on behind every query or, bidirectional, window."""
    inputs = random_inputs(queries=6, keys=20, query_offset=9, window=5, causal=causal, absent=WEIGHTS)
    expected = inputs.run_function(plain)
    unseen = [*range(5), *range(after, 20)]
    poisoned = {name: inputs.tensors[name].clone() for name in "kv"}
    for x in poisoned.values():
        x[:, unseen] = torch.nan
    results = inputs.with_tensors(**poisoned).run_function(plain)
    for name, result in results.items():
        assert torch.equal(result, expected[name]), name


def test_gradients_match_finite_differences():
    inputs = random_inputs(queries=4, keys=6, heads=4, kv_heads=2, head_dim=2, window=3, documents=4, absent=WEIGHTS)
    leaves = [tensor.requires_grad_() for tensor in inputs.tensors.values()]
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, **inputs.options), leaves)
