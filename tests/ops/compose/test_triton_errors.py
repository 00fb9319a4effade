"""Rounding errors of the Triton backend against plain PyTorch, and what its bits must not depend on."""

import itertools

import pytest
import torch

from dcscale.testing.attention import assert_same, check_results, random_inputs, unfused_attention

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton.tiles import Tile, Tiles
from dcscale.testing.staged import BLOCKWISE, DEVICE, SMALL_TILES, staged, staged_results

pytestmark = [pytest.mark.usefixtures("quick_interpreter"), pytest.mark.filterwarnings("error::RuntimeWarning")]

LARGE_TILES = Tiles(*[Tile(64, 64, 8)] * 3)
"""Interpreted, an element of a large tile costs little, and the error rule needs hundreds of elements."""


def run(inputs, dtype=torch.float32, tiles=BLOCKWISE, **options):
    return staged_results(staged(inputs, dtype, tiles), inputs, **options)


@pytest.mark.parametrize(
    ("heads", "queries", "batch", "head_dim"), [(4, 33, 2, 16), (1, 64, 8, 17), (6, 31, 2, 80), (32, 17, 1, 80)]
)
def test_error_of_every_tensor_in_float32(heads, queries, batch, head_dim, record_property):
    """Errors of the output and all 15 gradients, at most twice and three times those of plain PyTorch."""
    inputs = random_inputs(batch=batch, queries=queries, heads=heads, head_dim=head_dim)
    results, plain, truth = (
        run(inputs, tiles=LARGE_TILES),
        inputs.to(torch.float32).run("reference"),
        inputs.run("reference"),
    )
    assert len(results) == 16
    for name in truth:
        errors = [(x[name].double() - truth[name]).norm() / truth[name].norm() for x in (results, plain)]
        record_property(name, f"relative error {errors[0]:.2e}, plain PyTorch {errors[1]:.2e}")
    check_results(results, plain, truth)


CASES_16 = {
    "wide heads": {"queries": 33, "heads": 4, "kv_heads": 2, "head_dim": 80},
    "many heads": {"queries": 31, "heads": 8, "kv_heads": 4, "head_dim": 16, "batch": 1},
    "bidirectional": {"queries": 40, "causal": False, "batch": 1, "documents": 20},
    "odd heads": {"queries": 31, "heads": 3, "head_dim": 17, "rank": 1},
    # A query for which one key has almost all probability: small differences of rounded numbers decide its gradient.
    "one key dominates": {"queries": 33, "heads": 4, "kv_heads": 2, "head_dim": 16, "seed": 3},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", CASES_16.values(), ids=CASES_16)
def test_error_of_every_tensor_in_16_bits(options, dtype):
    inputs = random_inputs(**options)
    check_results(
        run(inputs, dtype, LARGE_TILES), inputs.to(dtype).run_function(unfused_attention), inputs.run("reference")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_over_chunks_and_tiles_in_16_bits(dtype):
    inputs = random_inputs(queries=40, heads=2, batch=1, window=12, head_dim=16, scratch_bytes=1)
    check_results(run(inputs, dtype), inputs.to(dtype).run_function(unfused_attention), inputs.run("reference"))


@pytest.mark.parametrize(("keep", "options"), [(False, {"window": 12, "documents": 11}), (True, {"causal": False})])
def test_nothing_is_read_before_it_is_written(keep, options):
    """All memory starts as NaN. Two runs give the same bits. In products, some blocks are not seen by any query."""
    inputs = random_inputs(batch=1, queries=40, heads=2, scratch_bytes=1, **options)
    expected = run(inputs, tiles=SMALL_TILES)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(1).isnan()
        assert expected["q"].new_empty(1).isnan()
        assert_same(run(inputs, tiles=SMALL_TILES, keep=keep), expected, tolerance=0)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("causal", "after"), [(True, 15), (False, 19)])
def test_keys_that_no_query_sees_are_not_accessed(causal, after):
    """Positions 0..4 are before every window, those from ``after`` on behind every query or, bidirectional, window."""
    inputs = random_inputs(batch=1, queries=6, keys=20, heads=2, query_offset=9, window=5, causal=causal)
    inputs = inputs.to(torch.float32, DEVICE)
    expected = inputs.run("triton")
    unseen = [*range(5), *range(after, 20)]
    poisoned = {name: x.clone() for name, x in inputs.tensors.items()}
    by_key = [name for name in poisoned if name in "kv" or "k" in name]
    for name in by_key:
        poisoned[name][:, unseen] = torch.nan
    results = inputs.with_tensors(**poisoned).run("triton")
    assert_same(results, expected, tolerance=0)
    for name in by_key:
        assert not results[name][:, unseen].any(), name


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        *itertools.product((torch.float32, torch.bfloat16), [{"queries": 20}]),
        (torch.float16, {"queries": 40, "window": 12, "scratch_bytes": 1}),
    ],
)
def test_kept_or_recomputed_gives_the_same_bits(dtype, options):
    inputs = random_inputs(batch=1, heads=2, **options)
    assert_same(run(inputs, dtype, keep=True), run(inputs, dtype), tolerance=0)


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 4), (torch.bfloat16, 16)])
def test_error_where_scores_are_large(dtype, factor):
    """Probabilities must add up to 1, and delta fit the gradient, as they are stored: then rounding cancels."""
    inputs = random_inputs(queries=60, head_dim=16, batch=1)
    inputs = inputs.with_tensors(q=factor * inputs.tensors["q"])
    check_results(
        run(inputs, dtype, LARGE_TILES), inputs.to(dtype).run_function(unfused_attention), inputs.run("reference")
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_a_single_key_have_no_gradient(dtype):
    """Its probability is 1 whatever its score is, so exactly nothing may come back."""
    inputs = random_inputs(queries=20, heads=2, batch=1, window=1)
    results = run(inputs.with_tensors(q=16 * inputs.tensors["q"]), dtype)
    assert not results["q"].any()
    assert not results["pre.qg"].any()
    assert results["v"].any()


@pytest.mark.parametrize("causal", [True, False])
def test_a_window_beyond_any_length_is_none(causal):
    inputs = random_inputs(queries=20, heads=2, batch=1, causal=causal)
    expected = run(inputs)
    inputs.options["window"] = 2**31 - 1
    assert_same(run(inputs), expected, tolerance=0)


def test_a_score_that_float16_cannot_hold_does_no_harm_where_it_is_not_seen():
    """The last key's scores against earlier queries are beyond 65,504, against its own query 0."""
    inputs = random_inputs(queries=20, heads=2, batch=1, head_dim=16)
    q, k = (inputs.tensors[name].clone() for name in "qk")
    q[:, :-1, :, 0], q[:, -1], k[:, :-1, :, 0], k[:, -1] = 1000, 0, 0, 1000
    results = run(inputs.with_tensors(q=q, k=k), torch.float16)
    assert all(torch.isfinite(x).all() for x in results.values())
