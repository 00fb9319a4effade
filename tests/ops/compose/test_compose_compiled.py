"""The compiled backend against the definition. All tests but one run the formulas without compiling them."""

import itertools
from functools import partial

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dcscale.ops import compose_attention
from dcscale.ops.compose import compiled
from dcscale.testing.attention import (
    COMPOSE_CALLS,
    WEIGHTS,
    arguments,
    assert_same,
    check_results,
    random_inputs,
    unfused_attention,
)


@pytest.fixture
def uncompiled(monkeypatch):
    """Runs the functions of a chunk without compiling them."""
    monkeypatch.setattr(compiled, "_compile", lambda function, kind: function)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of at most four queries."""
    monkeypatch.setattr(compiled, "MAX_CHUNK_QUERIES", 4)


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_equals_the_reference_in_float64(options):
    inputs = random_inputs(**options)
    assert_same(inputs.run("compiled"), inputs.run("reference"))


@pytest.mark.usefixtures("uncompiled", "small_chunks")
@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_equals_the_reference_over_small_chunks(options):
    inputs = random_inputs(**options)
    assert_same(inputs.run("compiled"), inputs.run("reference"))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=6)))
def test_any_weights_may_be_missing(present):
    """Every subset in pre, its complement in post; a low-rank factor without its partner has no effect."""
    absent = [name for name, there in zip(WEIGHTS[:6], present) if not there]
    absent += [name for name, there in zip(WEIGHTS[6:], present) if there]
    inputs = random_inputs(batch=1, queries=5, absent=absent)
    assert_same(inputs.run("compiled"), inputs.run("reference"))


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("call", ["two chunks", "window", "documents", "grouped", "rank 4"])
def test_error_in_the_dtypes_of_training(call, dtype):
    inputs = random_inputs(**{**COMPOSE_CALLS[call], "batch": 8})
    narrow = inputs.to(dtype)
    check_results(narrow.run("compiled"), narrow.run_function(unfused_attention), inputs.run("reference"))


@pytest.mark.usefixtures("uncompiled", "small_chunks")
@pytest.mark.parametrize(("causal", "after"), [(True, 15), (False, 19)])
def test_keys_that_no_query_sees_are_not_accessed(causal, after):
    """Positions 0..4 are before every window, those from ``after`` on behind every query or, bidirectional, window."""
    inputs = random_inputs(queries=6, keys=20, query_offset=9, window=5, causal=causal)
    expected = inputs.run("compiled")
    unseen = [*range(5), *range(after, 20)]
    poisoned = {name: x.clone() for name, x in inputs.tensors.items()}
    for name in (name for name in poisoned if name in "kv" or "k" in name):
        poisoned[name][:, unseen] = torch.nan
    assert_same(inputs.with_tensors(**poisoned).run("compiled"), expected, tolerance=0)


@pytest.mark.usefixtures("uncompiled")
def test_only_the_inputs_are_kept_for_backward():
    inputs = random_inputs(queries=64, documents=20)
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    kept = set()
    with saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        compose_attention(*arguments(leaves), **inputs.options, backend="compiled")
    assert kept == {x.data_ptr() for x in (*leaves.values(), inputs.options["document_ids"])}


@pytest.mark.usefixtures("uncompiled")
def test_the_scratch_budget_limits_the_scores(monkeypatch):
    budget, sizes = 2**18, []
    original = compiled._compose_forward
    monkeypatch.setattr(compiled, "_compose_forward", lambda x, w: sizes.append(x.nbytes) or original(x, w))
    random_inputs(batch=2, queries=300, heads=4, scratch_bytes=budget).run("compiled")
    assert budget / 2 < max(sizes) * compiled.SCRATCH_PER_SCORES <= budget


@pytest.mark.usefixtures("uncompiled")
def test_scores_stay_within_their_limit(monkeypatch):
    limit, heads = 2**12, 4
    monkeypatch.setattr(compiled, "MAX_SCORE_ELEMENTS", limit)
    sizes = []
    original = compiled._compose_forward
    monkeypatch.setattr(compiled, "_compose_forward", lambda x, w: sizes.append(x.numel()) or original(x, w))
    for window in (None, 30):
        random_inputs(batch=2, queries=300, heads=heads, window=window).run("compiled")
    assert max(sizes) <= limit
    assert max(sizes) > limit // 2


@pytest.fixture
def traced(monkeypatch):
    """Compiles without generating code, which is what takes the time; nothing has been compiled before."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled._compile.cache_clear()
    monkeypatch.setattr(compiled, "_compile", partial(compiled._compile, backend="eager"))
    yield
    compiled._compile.func.cache_clear()


KINDS = [
    {"queries": queries, "window": window, "documents": documents}
    for window in (16, 40, None)
    for queries, documents in ((70, None), (20, None), (1, None), (70, 25), (20, 25))
]
OTHER_KINDS = [
    {"queries": 7, "keys": 30},
    {"queries": 70, "keys": 90, "window": 12, "query_offset": 3},
    {"queries": 33, "scale": 0.7},
    {"queries": 33, "causal": False, "window": 5},
    {"queries": 9, "keys": 31, "causal": False},
    {"queries": 9, "keys": 1, "causal": False},
    {"queries": 64, "batch": 3},
]


@pytest.mark.usefixtures("traced")
def test_one_process_may_call_it_with_any_lengths_windows_and_documents():
    for options in [*KINDS, *OTHER_KINDS]:
        inputs = random_inputs(**{"batch": 1, "heads": 2, **options})
        assert_same(inputs.run("compiled"), inputs.run("reference"))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for each direction


@pytest.mark.usefixtures("traced")
@torch.no_grad()
def test_torch_counts_models_of_different_shapes_apart():
    with torch._dynamo.config.patch(recompile_limit=1, error_on_recompile=True):
        for heads in (2, 3):
            inputs = random_inputs(batch=1, queries=5, heads=heads)
            out, expected = (
                compose_attention(*arguments(inputs.tensors), backend=b) for b in ("compiled", "reference")
            )
            assert_same({"out": out}, {"out": expected})


@pytest.mark.usefixtures("traced")
def test_at_torchs_limit_it_warns_and_computes_without_compiling():
    inputs = random_inputs(batch=1, queries=5, keys=9)
    warning = pytest.warns(
        UserWarning, match="'compiled' continues without compiling: torch's recompile_limit was reached"
    )
    with torch._dynamo.config.patch(recompile_limit=0), warning:
        results = inputs.run("compiled")
    assert_same(results, inputs.run("reference"))


@pytest.mark.filterwarnings("ignore::FutureWarning")  # raised inside torch
def test_compiled_results_equal_the_reference():
    """With documents, and with a last chunk of another size, which must not recompile."""
    torch._dynamo.reset()
    inputs = random_inputs(batch=1, queries=70, heads=2, kv_heads=1, documents=20, window=40)
    shorter = random_inputs(batch=1, queries=100, heads=2, kv_heads=1, documents=20, window=40)
    results = inputs.run("compiled")
    assert_same(results, inputs.run("reference"))
    assert_same(inputs.run("compiled"), results, tolerance=0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same(shorter.run("compiled"), shorter.run("reference"))
