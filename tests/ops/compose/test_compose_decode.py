"""The path for few queries without gradients: against the definition, and when it is taken."""

import itertools

import pytest
import torch

from dcscale.ops import compose_attention
from dcscale.ops.compose import api
from dcscale.ops.compose.decode import MAX_QUERIES, decode_attention, suits_decode
from dcscale.ops.compose.reference import reference_attention
from dcscale.testing.attention import (
    COMPOSE_CALLS,
    FORWARD_FACTOR,
    WEIGHTS,
    arguments,
    assert_same,
    check_error,
    random_inputs,
)

FEW = {
    f"{queries}, {name}": {"queries": queries, "keys": 23, **options}
    for queries in range(1, 9)
    for name, options in {
        "all keys": {},
        "window": {"window": 6},
        "window of one": {"window": 1},
        "documents, window": {"documents": 5, "window": 9},
        "grouped": {"heads": 6, "kv_heads": 2},
    }.items()
}


def decode(inputs):
    return {"out": decode_attention(inputs.call())}


def reference(inputs):
    return {"out": reference_attention(inputs.call())}


@pytest.mark.parametrize("options", [*FEW.values(), *COMPOSE_CALLS.values()], ids=[*FEW, *COMPOSE_CALLS])
def test_equals_the_reference_in_float64(options):
    inputs = random_inputs(**options)
    assert_same(decode(inputs), reference(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", FEW.values(), ids=FEW)
def test_error_in_other_dtypes(options, dtype):
    """Against the formula in float32, with one rounding at the end for 16 bits."""
    inputs = random_inputs(**{**options, "batch": 8})
    narrow = inputs.to(dtype)
    out, plain, truth = (each["out"] for each in (decode(narrow), reference(narrow), reference(inputs)))
    assert out.dtype == dtype
    check_error("out", out, plain, truth, FORWARD_FACTOR)


@pytest.mark.parametrize("present", list(itertools.product((False, True), repeat=6)))
def test_any_weights_may_be_missing(present):
    """Every subset in pre, its complement in post; a low-rank factor without its partner has no effect."""
    absent = [name for name, there in zip(WEIGHTS[:6], present) if not there]
    absent += [name for name, there in zip(WEIGHTS[6:], present) if there]
    inputs = random_inputs(queries=2, keys=7, absent=absent)
    assert_same(decode(inputs), reference(inputs))


def test_tensors_in_any_memory_order_are_not_changed():
    inputs = random_inputs(queries=2, keys=17, documents=5)
    shuffled = {name: x.transpose(0, -1).contiguous().transpose(0, -1) for name, x in inputs.tensors.items()}
    before = {name: x.clone() for name, x in shuffled.items()}
    assert_same(decode(inputs.with_tensors(**shuffled)), reference(inputs))
    assert all(torch.equal(shuffled[name], x) for name, x in before.items())


def test_two_runs_give_the_same_bits():
    inputs = random_inputs(queries=3, keys=200, heads=6, kv_heads=3, window=40, documents=30).to(torch.float32)
    assert torch.equal(decode(inputs)["out"], decode(inputs)["out"])


def test_keys_that_no_query_sees_are_not_accessed():
    inputs = random_inputs(queries=3, keys=20, query_offset=9, window=5)
    poisoned = {name: x.clone() for name, x in inputs.tensors.items()}
    for name in (name for name in poisoned if name in "kv" or "k" in name):
        poisoned[name][:, [*range(5), *range(12, 20)]] = torch.nan
    assert_same(decode(inputs.with_tensors(**poisoned)), decode(inputs), tolerance=0)


# -- when it is taken ------------------------------------------------------------------------------------------


@pytest.fixture
def decoded(monkeypatch):
    """The number of queries of each call that compose_attention decodes."""
    calls = []
    monkeypatch.setattr(api, "decode_attention", lambda call: calls.append(call.q.shape[1]) or decode_attention(call))
    return calls


def test_only_few_queries_are_decoded(decoded):
    for queries in (1, MAX_QUERIES, MAX_QUERIES + 1):
        inputs = random_inputs(queries=queries, keys=12)
        out = compose_attention(*arguments(inputs.tensors))
        assert_same({"out": out}, reference(inputs))
    assert decoded == [1, MAX_QUERIES]


@pytest.mark.parametrize("name", ["q", "v", "pre.k1", "post.qg"])
def test_what_needs_gradients_is_not_decoded(decoded, name):
    inputs = random_inputs(queries=1, keys=5)
    inputs.tensors[name].requires_grad_()
    compose_attention(*arguments(inputs.tensors)).sum().backward()
    assert inputs.tensors[name].grad is not None
    assert decoded == []
    with torch.no_grad():
        compose_attention(*arguments(inputs.tensors))
    assert decoded == [1]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_a_backend_that_was_asked_for_is_used(decoded, backend):
    compose_attention(*arguments(random_inputs(queries=1).tensors), backend=backend)
    assert decoded == []


def test_under_autocast_nothing_is_decoded(decoded):
    inputs = random_inputs(queries=1).to(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        compose_attention(*arguments(inputs.tensors))
    assert decoded == []


@torch.no_grad()
def test_torch_compile_and_the_meta_device():
    inputs = random_inputs(queries=2, keys=7)
    compiled = torch.compile(compose_attention, backend="eager", fullgraph=True)
    assert_same({"out": compiled(*arguments(inputs.tensors))}, reference(inputs))
    on_meta = {name: x.to("meta") for name, x in inputs.tensors.items()}
    assert compose_attention(*arguments(on_meta)).shape == inputs.tensors["q"].shape


def test_calls_beyond_the_scratch_memory_are_not_decoded():
    inputs = random_inputs(batch=2, queries=1, keys=1000, heads=4, rank=2).to(torch.float32)
    scores = 2 * 4 * 1000 * 4  # bytes
    assert suits_decode(inputs.call()._replace(scratch_bytes=8 * scores))
    assert not suits_decode(inputs.call()._replace(scratch_bytes=8 * scores - 1))
