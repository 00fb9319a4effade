"""Plain attention through FlashAttention: how its packages are called and, on a GPU, their results.

Without a GPU dense fakes replace the packages. They have the signatures and the documented behavior of flash-attn 2.7
and 2.8, of flash-attn-3 of December 2025 and of flash-attn-4 of August 2026.
"""

import sys
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dcscale.ops import attention, compose_attention, flash
from dcscale.testing.attention import PLAIN_CALLS, WEIGHTS, check_results, random_inputs, unfused_attention
from dcscale.testing.models import random_ids, random_model, tiny_config


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Query i is at key i + S - T, and sees ``window_size`` keys to its left and right; -1 means all."""
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs, deterministic) == (0.0, 0.0, None, False, True)
    left, right = window_size
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    distance = torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + keys - queries)
    seen = distance <= (0 if causal else right if right >= 0 else queries + keys)
    if left >= 0:
        seen &= distance >= -left
    k, v = (x.repeat_interleave(group, dim=2) for x in (k, v))
    scores = softmax_scale * torch.einsum("bthd,bshd->bhts", q, k)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Packed sequences; the output of one that is longer than ``max_seqlen`` stays NaN."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (cu_seqlens_q[0], cu_seqlens_k[0], block_table) == (0, 0, None)
    out = q.new_full(q.shape, torch.nan)
    for i in range(len(cu_seqlens_q) - 1):
        rows, keys = slice(*cu_seqlens_q[i : i + 2].tolist()), slice(*cu_seqlens_k[i : i + 2].tolist())
        if rows.stop - rows.start > max_seqlen_q or keys.stop - keys.start > max_seqlen_k:
            continue
        out[rows] = flash_attn_func(
            *(x[None] for x in (q[rows], k[keys], v[keys])),
            *(dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs),
        )[0]
    return out


def recorder(name, function, made):
    """Wraps the function so that its calls are appended to ``made`` as (name, arguments, options)."""

    def called(*arguments, **options):
        made.append((name, arguments, options))
        return function(*arguments, **options)

    return called


def flash_3(
    q,
    k,
    v,
    softmax_scale=None,
    causal=False,
    qv=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    window_size=(-1, -1),
    deterministic=False,
):
    options = {"causal": causal, "window_size": window_size, "deterministic": deterministic}
    return flash_attn_func(q, k, v, softmax_scale=softmax_scale, **options)


def flash_3_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, **options
):
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)


def flash_4(q, k, v, qv=None, gather_kv_indices=None, *, window_size=(None, None), **options):
    left, right = (-1 if side is None else side for side in window_size)
    return flash_attn_func(q, k, v, window_size=(left, right), **options), "log-sums"


def flash_4_varlen(q, k, v, qv=None, *, window_size=(None, None), **options):
    left, right = (-1 if side is None else side for side in window_size)
    return flash_attn_varlen_func(q, k, v, window_size=(left, right), **options), "log-sums"


FUNCTIONS = {
    "flash-attn-4": ("flash_attn.cute", flash_4, flash_4_varlen),
    "flash-attn-3": ("flash_attn_interface", flash_3, flash_3_varlen),
    "flash-attn": ("flash_attn", flash_attn_func, flash_attn_varlen_func),
}


def install_fake(monkeypatch, package, made):
    """Installs the fake of a package alone; its calls are appended to ``made``."""
    module, *functions = FUNCTIONS[package]
    fake = ModuleType(module)
    for name, function in zip(("flash_attn_func", "flash_attn_varlen_func"), functions):
        setattr(fake, name, recorder(name, function, made))
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))  # the parent of flash_attn.cute
    monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(flash, "unavailable_reason", lambda q, other: None if other == package else "not installed")
    return fake


@pytest.fixture
def calls(monkeypatch):
    """Installs the fake of flash-attn for every call; returns the recorded calls."""
    made = []
    install_fake(monkeypatch, "flash-attn", made)
    return made


def plain(q, k, v, pre, post, **options):
    assert pre is post is None
    return attention(q, k, v, **options)


# -- how the package is called ---------------------------------------------------------------------------------


@pytest.mark.parametrize("package", flash.PACKAGES_OF_RUNS)
@pytest.mark.parametrize("options", PLAIN_CALLS.values(), ids=PLAIN_CALLS)
def test_equals_the_reference(options, package, monkeypatch):
    calls = []
    install_fake(monkeypatch, package, calls)
    inputs = random_inputs(**options, absent=WEIGHTS)
    expected = inputs.run("reference")
    for name, result in inputs.run_function(plain).items():
        assert (result - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
    assert torch.equal(inputs.run("auto")["out"], inputs.run_function(plain)["out"])

    made = {name for name, _, _ in calls}
    positions_before = options.get("query_offset", options.get("keys", options["queries"]) - options["queries"])
    if "documents" not in options:
        assert made == {"flash_attn_func"}
    else:
        assert made == (set() if positions_before else {"flash_attn_varlen_func"})


@pytest.mark.parametrize(
    "options", [{"window": 5}, {"causal": False}, {"causal": False, "window": 5}, {"documents": 4}]
)
def test_flash_attention_4_equals_the_reference(options, monkeypatch):
    """It is only measured, but by the same function."""
    calls = []
    install_fake(monkeypatch, "flash-attn-4", calls)
    inputs = random_inputs(queries=20, absent=WEIGHTS, **options)
    given = {"causal": True, "window": None, **inputs.options}
    given |= {"document_ids_BS": given.pop("document_ids", None), "scale": 8**-0.5, "query_offset": 0}
    out = flash.flash_attention(*inputs.tensors.values(), **given, package="flash-attn-4")
    torch.testing.assert_close(out, inputs.run("reference")["out"])
    assert len(calls) == 1


def documents_call(ids, calls, dtype=torch.int64, **options):
    """Checks attention() with these document ids; returns the calls of flash-attn."""
    inputs = random_inputs(batch=len(ids), queries=len(ids[0]), absent=WEIGHTS, **options)
    inputs.options["document_ids"] = torch.tensor(ids, dtype=dtype)
    expected = inputs.run("reference")
    for name, result in inputs.run_function(plain).items():
        assert (result - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
    return [(arguments, options) for _, arguments, options in calls]


def test_documents_become_packed_sequences(calls):
    """Even if a row's first document has the same id as the previous row's last one."""
    (((q, k, v), options),) = documents_call([[4, 4, 4, 7, 7], [7, 8, 9, 9, 9]], calls, window=2)
    assert [x.shape for x in (q, k, v)] == [(10, 4, 8)] * 3
    assert [options.pop(f"cu_seqlens_{side}").tolist() for side in "qk"] == [[0, 3, 5, 6, 7, 10]] * 2
    longest = [options.pop(f"max_seqlen_{side}") for side in "qk"]
    assert longest == [3, 3]
    assert type(longest[0]) is int
    assert options == {"softmax_scale": 8**-0.5, "causal": True, "window_size": (1, 0), "deterministic": True}


@pytest.mark.parametrize("ids", [[[0, 0, 1, 1, 0]], [[2, 2, 1, 1, 1]], [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]])
def test_documents_that_may_reappear_use_sdpa(ids, calls):
    assert documents_call(ids, calls) == []


def test_documents_of_any_integers(calls):
    """The difference of these ids overflows int8."""
    assert len(documents_call([[-128, -128, 127, 127]], calls, dtype=torch.int8)) == 1


def test_more_documents_than_the_grid_allows_are_left_to_sdpa(calls):
    inputs = random_inputs(batch=1, queries=4, absent=WEIGHTS, document_ids=torch.tensor([[0, 1, 2, 2]]))
    tensors = [inputs.tensors[name] for name in "qkv"]
    options = {"causal": True, "window": None, "scale": 8**-0.5, "query_offset": 0}
    options |= {"package": "flash-attn", "max_documents": 3}
    out = flash.flash_attention(*tensors, document_ids_BS=inputs.options["document_ids"], **options)
    torch.testing.assert_close(out, inputs.run("reference")["out"])
    calls.clear()
    assert flash.flash_attention(*tensors, document_ids_BS=torch.tensor([[0, 1, 2, 3]]), **options) is None
    assert calls == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.compile caches the first flash_attn that it imports")
@pytest.mark.parametrize("documents", [None, 4])
def test_under_compile_and_recomputation(calls, monkeypatch, documents):
    """Without documents the graph has no break; with documents one, where their number is read."""
    for function in (flash_attn_func, flash_attn_varlen_func):  # not the recorders: they break the graph
        monkeypatch.setattr(sys.modules["flash_attn"], function.__name__, function)
    inputs = random_inputs(queries=12, kv_heads=2, window=7, documents=documents, absent=WEIGHTS)

    def recomputed(*arguments, **options):
        return checkpoint(lambda *inner: 2 * plain(*inner, **options), *arguments, use_reentrant=False)

    compiled = torch.compile(recomputed, backend="aot_eager", fullgraph=documents is None)
    expected = inputs.run_function(lambda *arguments, **options: 2 * plain(*arguments, **options))
    for function in (recomputed, compiled):
        results = inputs.run_function(function)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("documents", [False, True])
def test_a_transformer_trains_with_it(calls, monkeypatch, documents):
    config = tiny_config(attention="mha", kv_heads=2)
    model = random_model(config, recompute="block")
    ids = random_ids(config, 2, 12)
    document_ids = (torch.arange(11) // 4).expand(2, -1) if documents else None

    def gradients():
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:], document_ids).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    found = gradients()
    assert len(calls) == 2 * config.layers
    assert {name for name, _, _ in calls} == {"flash_attn_varlen_func" if documents else "flash_attn_func"}
    monkeypatch.setattr(flash, "unavailable_reason", lambda q, package: "not now")
    torch.testing.assert_close(found, gradients(), rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * config.layers


# -- its results, on a GPU -------------------------------------------------------------------------------------


IMPORTED = flash._functions


@pytest.fixture(params=flash.PACKAGES_OF_RUNS)
def package(request, monkeypatch):
    """The recorded calls of an installed package."""
    if not torch.cuda.is_available():
        pytest.skip("FlashAttention needs a GPU")
    problem = flash.unavailable_reason(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"), request.param)
    if problem is not None:
        pytest.skip(problem)
    original = flash.unavailable_reason
    monkeypatch.setattr(
        flash, "unavailable_reason", lambda q, name: original(q, name) if name == request.param else "not now"
    )
    made, names = [], ("flash_attn_func", "flash_attn_varlen_func")
    recorders = [recorder(name, function, made) for name, function in zip(names, IMPORTED(request.param))]
    monkeypatch.setattr(flash, "_functions", lambda package: recorders)
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", PLAIN_CALLS.values(), ids=PLAIN_CALLS)
def test_error_on_a_gpu(package, options, dtype):
    inputs = random_inputs(**{**options, "batch": 8, "head_dim": 64}, absent=WEIGHTS).to(torch.float64, "cuda")
    narrow, expected = inputs.to(dtype), inputs.run("reference")
    results, unfused = narrow.run_function(plain), narrow.run_function(unfused_attention)
    if options["queries"] == options.get("keys", 1) or options.get("window") == 1:  # q, k have no effect
        expected, results, unfused = ({name: x[name] for name in ("out", "v")} for x in (expected, results, unfused))
    check_results(results, unfused, expected)
    assert bool(package) == ("documents" not in options or options.get("query_offset") == 0 or "keys" not in options)


LONG = {"batch": 2, "queries": 1500, "heads": 8, "kv_heads": 2, "head_dim": 128}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 256}, {"documents": 200}, {"window": 256, "documents": 200}])
def test_long_rows_on_a_gpu(package, monkeypatch, options):
    """Many blocks of keys: as precise as the reference in bfloat16, and the same bits in every run, compiled too."""
    inputs = random_inputs(**LONG, **options, absent=WEIGHTS).to(torch.float64, "cuda")
    narrow = inputs.to(torch.bfloat16)
    results = narrow.run_function(plain)
    check_results(results, narrow.run_function(unfused_attention), inputs.run("reference"))
    assert {name for name, _, _ in package} == {
        "flash_attn_varlen_func" if "documents" in options else "flash_attn_func"
    }
    monkeypatch.setattr(flash, "_functions", IMPORTED)  # the recorders would break the graph
    for function in [plain] * 5 + [torch.compile(plain, fullgraph="documents" not in options)]:
        for name, again in narrow.run_function(function).items():
            assert torch.equal(again, results[name]), name


@pytest.mark.gpu
def test_equals_scaled_dot_product_attention_on_a_gpu(package, monkeypatch):
    inputs = random_inputs(**LONG, window=256, absent=WEIGHTS).to(torch.float64, "cuda").to(torch.bfloat16)
    results = inputs.run_function(compose_attention)
    assert len(package) == 1
    monkeypatch.setattr(flash, "unavailable_reason", lambda q, package: "not now")
    for name, other in inputs.run_function(compose_attention).items():
        assert (results[name] - other).norm() <= 0.02 * other.norm(), name
    assert len(package) == 1
