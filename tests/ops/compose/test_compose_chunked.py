"""The chunked backend against the definition: results, gradients, memory, and keys that it must not access."""

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dcscale.ops import ComposeWeights, compose_attention
from dcscale.ops.compose import chunked
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
def small_chunks(monkeypatch):
    """Chunks of at most four queries and 600 scores, so that short sequences have many chunks."""
    monkeypatch.setattr(chunked, "MAX_CHUNK_QUERIES", 4)
    monkeypatch.setattr(chunked, "MAX_SCORE_ELEMENTS", 600)


@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_equals_the_reference_in_float64(options):
    inputs = random_inputs(**options)
    assert_same(inputs.run("chunked"), inputs.run("reference"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_equals_the_reference_over_small_chunks(options):
    inputs = random_inputs(**options)
    assert_same(inputs.run("chunked"), inputs.run("reference"))


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=6)))
def test_any_weights_may_be_missing(present):
    """Every subset in pre, its complement in post; a low-rank factor without its partner has no effect."""
    absent = [name for name, there in zip(WEIGHTS[:6], present) if not there]
    absent += [name for name, there in zip(WEIGHTS[6:], present) if there]
    inputs = random_inputs(batch=1, queries=5, absent=absent)
    assert_same(inputs.run("chunked"), inputs.run("reference"))


@pytest.mark.parametrize("stage", ["pre", "post"])
def test_one_stage_alone(stage):
    inputs = random_inputs(queries=11, absent=[name for name in WEIGHTS if not name.startswith(stage)])
    assert_same(inputs.run("chunked"), inputs.run("reference"))
    assert (inputs.run("chunked")["out"] - plain(inputs)).norm() > 0.1 * plain(inputs).norm()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_weights_give_plain_attention(backend):
    inputs = random_inputs(queries=11, absent=WEIGHTS)
    torch.testing.assert_close(inputs.run(backend)["out"], plain(inputs))


def plain(inputs):
    return compose_attention(*(inputs.tensors[name] for name in "qkv"))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_gradients_match_finite_differences(backend):
    inputs = random_inputs(
        batch=2, queries=4, keys=6, heads=4, kv_heads=2, head_dim=2, rank=2, window=3, documents=4, seed=1
    )

    def function(*tensors):
        return compose_attention(*arguments(dict(zip(inputs.tensors, tensors))), **inputs.options, backend=backend)

    leaves = [tensor.requires_grad_() for tensor in inputs.tensors.values()]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_error_in_float32(options):
    inputs = random_inputs(**{**options, "batch": 8})
    single = inputs.to(torch.float32)
    check_results(single.run("chunked"), single.run("reference"), inputs.run("reference"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", COMPOSE_CALLS.values(), ids=COMPOSE_CALLS)
def test_error_in_16_bits(options, dtype):
    """Against the formula in 16 bits, and against the formula in float32 with one rounding at the end."""
    inputs = random_inputs(**{**options, "batch": 8})
    truth = inputs.run("reference")
    half = inputs.to(dtype)
    results = half.run("chunked")
    check_results(results, half.run_function(unfused_attention), truth)
    check_results(results, half.run("reference"), truth)


def test_tensors_in_any_memory_order():
    inputs = random_inputs(queries=17)
    expected = inputs.run("reference")
    shuffled = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.tensors.items()}
    assert not any(x.is_contiguous() for x in shuffled.values())
    assert_same(inputs.with_tensors(**shuffled).run("chunked"), expected)
    inputs.cotangent = inputs.cotangent[:, :1].expand(-1, 17, -1, -1)
    assert_same(inputs.run("chunked"), inputs.run("reference"))


@pytest.mark.usefixtures("small_chunks")
def test_nothing_is_read_before_it_is_written(monkeypatch):
    """All memory starts as NaN, and scratch is reset to NaN for every chunk."""

    class Poisoned(chunked.Scratch):
        def take(self, name, shape):
            return super().take(name, shape).fill_(torch.nan)

    inputs = random_inputs(queries=11, window=5, documents=6)
    expected = inputs.run("chunked")
    monkeypatch.setattr(chunked, "Scratch", Poisoned)
    torch.use_deterministic_algorithms(True)  # fills torch.empty with NaN
    try:
        assert torch.empty(1).isnan()
        assert_same(inputs.run("chunked"), expected, tolerance=0)
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_runs_give_the_same_bits():
    inputs = random_inputs(queries=129, heads=6, kv_heads=3, window=40, documents=30).to(torch.float32)
    for first, second in zip(inputs.run("chunked").values(), inputs.run("chunked").values()):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.usefixtures("small_chunks")
def test_the_future_has_no_effect(backend):
    inputs = random_inputs(queries=16)
    expected = inputs.run(backend)["out"]
    for position in (1, 6, 15):
        later = {name: x.clone() for name, x in inputs.tensors.items()}
        for x in later.values():
            x[:, position:] += 3
        result = inputs.with_tensors(**later).run(backend)["out"]
        assert torch.equal(result[:, :position], expected[:, :position])
        assert not torch.isclose(result[:, position:], expected[:, position:]).all(dim=(2, 3)).any()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("causal", "after"), [(True, 15), (False, 19)])
def test_keys_that_no_query_sees_are_not_accessed(causal, after):
    """Positions 0..4 are before every window, those from ``after`` on behind every query or, bidirectional, window."""
    inputs = random_inputs(queries=6, keys=20, query_offset=9, window=5, causal=causal)
    expected = inputs.run("chunked")
    unseen = [*range(5), *range(after, 20)]
    poisoned = {name: x.clone() for name, x in inputs.tensors.items()}
    by_key = [name for name in poisoned if name in "kv" or "k" in name]
    for name in by_key:
        poisoned[name][:, unseen] = torch.nan
    results = inputs.with_tensors(**poisoned).run("chunked")
    assert_same(results, expected, tolerance=0)
    for name in by_key:
        assert not results[name][:, unseen].any(), name


@pytest.mark.usefixtures("small_chunks")
def test_the_cost_of_a_window_is_its_width():
    """The number of scores does not grow with the square of the length."""
    read = []
    original = chunked.visible_keys

    def counting(queries, keys, *rest):
        read.append(len(queries) * len(keys))
        return original(queries, keys, *rest)

    inputs = random_inputs(batch=1, queries=64, heads=2, window=8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked, "visible_keys", counting)
        inputs.run("chunked")
    passes = 2  # forward, and again in backward
    assert sum(read) <= passes * 64 * (8 + 4 - 1)


def test_only_the_inputs_are_kept_for_backward():
    inputs = random_inputs(queries=64, documents=20)
    leaves = {name: x.requires_grad_() for name, x in inputs.tensors.items()}
    kept = set()
    with saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        compose_attention(*arguments(leaves), **inputs.options, backend="chunked")
    assert kept == {x.data_ptr() for x in (*leaves.values(), inputs.options["document_ids"])}


@pytest.mark.parametrize("budget", [None, 2**17])
@pytest.mark.parametrize("queries", [64, 256])
def test_scratch_stays_within_its_limit(queries, budget, monkeypatch):
    """The limit on the elements of scores, or the budget in bytes."""
    limit, heads, rank = 2**13, 4, 2
    if budget is None:
        monkeypatch.setattr(chunked, "MAX_SCORE_ELEMENTS", limit)
    pools = []

    class Recorded(chunked.Scratch):
        def __init__(self, like):
            super().__init__(like)
            pools.append(self)

    monkeypatch.setattr(chunked, "Scratch", Recorded)
    options = {} if budget is None else {"scratch_bytes": budget}
    random_inputs(batch=3, queries=queries, heads=heads, rank=rank, **options).run("chunked")
    forward, backward = (sum(buffer.numel() for buffer in pool._buffers.values()) for pool in pools)
    if budget is not None:
        assert budget / 4 < 8 * backward <= budget  # float64
        return
    assert forward <= (3 + 2 * 2 * rank / heads) * limit
    assert backward <= (5 + 3 * 2 * rank / heads) * limit


def test_under_activation_checkpointing():
    inputs = random_inputs(queries=20, window=7)

    def recomputed(q, k, v, pre, post, **options):
        def inner(*tensors):
            weights = ComposeWeights(*tensors[3:9]), ComposeWeights(*tensors[9:])
            return compose_attention(*tensors[:3], *weights, **options, backend="chunked")

        return checkpoint(inner, q, k, v, *pre, *post, use_reentrant=False)

    assert_same(inputs.run_function(recomputed), inputs.run("chunked"), tolerance=0)


def test_torch_compile_sees_one_op():
    """aot_eager traces forward and backward as Inductor does, but runs the traced graphs without compiling them."""
    inputs = random_inputs(queries=20, window=7, documents=8, absent=["pre.kg", "post.q1", "post.q2"])

    def function(q, k, v, pre, post, **options):
        return 2 * compose_attention(q, k, v, pre, post, **options, backend="auto")

    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(inputs.run_function(compiled), inputs.run_function(function), tolerance=0)


@pytest.mark.parametrize("absent", [[], WEIGHTS[3:]])
def test_the_op_passes_opcheck(absent):
    """Schema, fake implementation, and autograd through the dispatcher."""
    inputs = random_inputs(batch=1, queries=5, absent=absent)
    weights = [inputs.tensors.get(name) for name in WEIGHTS]
    tensors = [None if x is None else x.requires_grad_() for x in (*(inputs.tensors[n] for n in "qkv"), *weights)]
    torch.library.opcheck(torch.ops.dcscale.compose_chunked.default, (*tensors, None, True, 3, 0.5, 0, 2**28))
