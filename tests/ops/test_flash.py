"""Plain attention through flash-attn: what is asked of the package, when it is asked, and, where it runs, its results.

Without a GPU a stand-in takes the package's place. It has the signatures of flash-attn 2.7 and 2.8, keeps to their
documentation and is dense.
"""

import re
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dcscale.ops import attention, choose_backend, compose_attention, flash
from dcscale.testing.attention import PLAIN_CALLS, WEIGHTS, check_results, random_inputs, unfused_attention
from dcscale.testing.models import lively_model, random_ids, tiny_config


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
    """Query i is at key i + S - T, and sees ``window_size`` keys to its left and right; -1 stands for all."""
    assert (dropout_p, softcap, alibi_slopes, return_attn_probs, deterministic) == (0.0, 0.0, None, False, True)
    left, right = window_size
    queries, keys, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    distance = torch.arange(keys)[None, :] - (torch.arange(queries)[:, None] + keys - queries)
    seen = distance <= (0 if causal else right if right >= 0 else keys)
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
    """Sequences one after the other; what lies beyond ``max_seqlen`` in one is never computed."""
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


def recorder(function, made):
    """The function, whose calls are added to ``made`` as (name, arguments, options)."""

    def called(*arguments, **options):
        made.append((function.__name__, arguments, options))
        return function(*arguments, **options)

    return called


STAND_IN = ModuleType("flash_attn")
STAND_IN.flash_attn_func, STAND_IN.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func


@pytest.fixture
def calls(monkeypatch):
    """The stand-in is installed and takes every call; their names and arguments."""
    made = []
    for function in (flash_attn_func, flash_attn_varlen_func):
        monkeypatch.setattr(STAND_IN, function.__name__, recorder(function, made))
    monkeypatch.setitem(sys.modules, "flash_attn", STAND_IN)
    monkeypatch.setattr(flash, "unavailable_reason", lambda q: None)
    return made


def plain(q, k, v, pre, post, **options):
    assert pre is post is None
    return attention(q, k, v, **options)


# -- what is asked of the package ------------------------------------------------------------------------------


@pytest.mark.parametrize("options", PLAIN_CALLS.values(), ids=PLAIN_CALLS)
def test_equals_the_reference(options, calls):
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


def documents_call(ids, calls, dtype=torch.int64, **options):
    """attention() with these document ids is right; returns the calls it made."""
    inputs = random_inputs(batch=len(ids), queries=len(ids[0]), absent=WEIGHTS, **options)
    inputs.options["document_ids"] = torch.tensor(ids, dtype=dtype)
    expected = inputs.run("reference")
    for name, result in inputs.run_function(plain).items():
        assert (result - expected[name]).norm() <= 1e-12 * expected[name].norm(), name
    return [(arguments, options) for _, arguments, options in calls]


def test_documents_are_sequences(calls):
    """Also where a row's first document has the id of the last one above."""
    (((q, k, v, *bounds_and_longest), options),) = documents_call([[4, 4, 4, 7, 7], [7, 8, 9, 9, 9]], calls, window=2)
    assert [x.shape for x in (q, k, v)] == [(10, 4, 8)] * 3
    *bounds, longest_q, longest_k = bounds_and_longest
    assert [x.tolist() for x in bounds] == [[0, 3, 5, 6, 7, 10]] * 2
    assert (longest_q, longest_k) == (3, 3)
    assert type(longest_q) is int
    assert options == {"softmax_scale": 8**-0.5, "causal": True, "window_size": (1, 0), "deterministic": True}


@pytest.mark.parametrize("ids", [[[0, 0, 1, 1, 0]], [[2, 2, 1, 1, 1]], [[0, 0, 0, 0, 0], [0, 1, 1, 0, 0]]])
def test_documents_that_might_come_back_take_another_way(ids, calls):
    assert documents_call(ids, calls) == []


def test_documents_of_any_integers(calls):
    """The largest steps there can be: their difference is not an int8."""
    assert len(documents_call([[-128, -128, 127, 127]], calls, dtype=torch.int8)) == 1


def test_more_documents_than_a_grid_is_long_take_another_way(calls, monkeypatch):
    monkeypatch.setattr(flash, "_MOST_DOCUMENTS", 3)
    assert len(documents_call([[0, 1, 2, 2]], calls)) == 1
    calls.clear()
    assert documents_call([[0, 1, 2, 3]], calls) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch.compile keeps the first flash_attn that it meets")
@pytest.mark.parametrize("documents", [None, 4])
def test_under_compile_and_recomputation(calls, monkeypatch, documents):
    """Without documents there is no break in the graph; with them one, where their number is read."""
    for function in (flash_attn_func, flash_attn_varlen_func):  # without the record, which would be a break itself
        monkeypatch.setattr(STAND_IN, function.__name__, function)
    inputs = random_inputs(queries=12, kv_heads=2, window=7, documents=documents, absent=WEIGHTS)

    def recomputed(*arguments, **options):
        return checkpoint(lambda *inner: 2 * plain(*inner, **options), *arguments, use_reentrant=False)

    compiled = torch.compile(recomputed, backend="aot_eager", fullgraph=documents is None)
    expected = inputs.run_function(lambda *arguments, **options: 2 * plain(*arguments, **options))
    for function in (recomputed, compiled):
        results = inputs.run_function(function)
        assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("documents", [False, True])
def test_a_transformer_trains_through_it(calls, monkeypatch, documents):
    config = tiny_config(attention="mha", kv_heads=2)
    model = lively_model(config, recompute="block")
    ids = random_ids(config, 2, 12)
    document_ids = (torch.arange(11) // 4).expand(2, -1) if documents else None

    def gradients():
        model.zero_grad()
        model(ids[:, :-1], ids[:, 1:], document_ids).backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    found = gradients()
    assert len(calls) == 2 * config.layers
    assert {name for name, _, _ in calls} == {"flash_attn_varlen_func" if documents else "flash_attn_func"}
    monkeypatch.setattr(flash, "unavailable_reason", lambda q: "not now")
    torch.testing.assert_close(found, gradients(), rtol=1e-12, atol=1e-12)
    assert len(calls) == 2 * config.layers


# -- when it is asked ------------------------------------------------------------------------------------------


class OnGPU:
    """As much of a tensor as the choice looks at."""

    device, dtype, shape = torch.device("cuda", 0), torch.bfloat16, (2, 9, 4, 64)


@pytest.fixture
def install(monkeypatch, tmp_path):
    """A GPU, and flash-attn installed with this version and module text; None for not installed."""
    flash._package_obstacle.cache_clear()
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)

    def installed(version, text="def flash_attn_func(): ...\ndef flash_attn_varlen_func(): ..."):
        information = tmp_path / f"flash_attn-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {version}\n")
        (tmp_path / "flash_attn.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)

    yield installed
    flash._package_obstacle.cache_clear()
    sys.modules.pop("flash_attn", None)


@pytest.mark.parametrize("version", ["2.7", "2.7.4.post1+cu12torch2.6cxx11abiFALSE", "2.10.0"])
def test_an_installed_package_is_used(install, version):
    install(version)
    assert choose_backend("auto", OnGPU) == ("flash-attn", "without compose weights this is plain attention")


def reason():
    chosen, why = choose_backend("auto", OnGPU)
    assert chosen == "sdpa"
    return why.removeprefix("without compose weights this is plain attention; not flash-attn: ")


def test_not_installed(install, monkeypatch):
    def missing(name):
        raise flash.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(flash.importlib.metadata, "version", missing)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reason() == "flash-attn is not installed (pip install flash-attn --no-build-isolation)"


UNDEFINED_SYMBOL = "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c10')"


@pytest.mark.parametrize(
    ("version", "text", "problem"),
    [
        ("2.6.3", "raise AssertionError('not to be imported')", "flash-attn 2.6.3 is installed, and 2.7 or newer"),
        ("2.8.3", UNDEFINED_SYMBOL, "importing it fails: ImportError: flash_attn_2_cuda.so: undefined symbol: _ZN3c10"),
        ("2.8.3", "raise OSError('libcudart.so.11.0')", "importing it fails: OSError: libcudart.so.11.0"),
        ("2.8.3", "", "importing it fails: ImportError: cannot import name 'flash_attn_func'"),
    ],
)
def test_a_package_that_cannot_be_used_is_named_once(install, version, text, problem):
    install(version, text)
    with pytest.warns(
        UserWarning, match=rf"{problem}.*scaled_dot_product_attention instead.*Build flash-attn for this PyTorch"
    ):
        assert problem in reason()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert problem in reason()


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("device", torch.device("cpu"), "it needs an NVIDIA GPU, and q is on cpu"),
        ("dtype", torch.float32, "it takes bfloat16 and float16, and q is torch.float32"),
        ("shape", (2, 9, 4, 320), r"it takes heads up to 256 wide, and q has shape (2, 9, 4, 320)"),
    ],
)
def test_calls_that_it_cannot_take(install, monkeypatch, name, value, problem):
    """Nothing is imported for them, so that nothing is said of a package that would not be used anyway."""
    install("2.8.3", UNDEFINED_SYMBOL)
    monkeypatch.setattr(OnGPU, name, value)
    assert reason() == problem


def test_gpus_that_it_cannot_use(install, monkeypatch):
    install("2.8.3", UNDEFINED_SYMBOL)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert reason() == "it needs compute capability 8.0, and the GPU has 7.5"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert reason() == "it is used on NVIDIA GPUs only"


def test_the_version_that_is_asked_for_is_the_one_that_is_declared():
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"flash-attn(.*)"', project) == [f">={flash.OLDEST_VERSION}"]


# -- its results, wherever it runs -----------------------------------------------------------------------------


@pytest.fixture
def package(monkeypatch):
    """The calls of the installed package's functions: their names and arguments."""
    if not torch.cuda.is_available():
        pytest.skip("flash-attn needs a GPU")
    problem = flash.unavailable_reason(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16, device="cuda"))
    if problem is not None:
        pytest.skip(problem)
    module = sys.modules["flash_attn"]
    made = []
    for function in (module.flash_attn_func, module.flash_attn_varlen_func):
        monkeypatch.setattr(module, function.__name__, recorder(function, made))
    return made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", PLAIN_CALLS.values(), ids=PLAIN_CALLS)
def test_error_on_a_gpu(package, options, dtype):
    inputs = random_inputs(**{**options, "batch": 8, "head_dim": 64}, absent=WEIGHTS).to(torch.float64, "cuda")
    narrow, expected = inputs.to(dtype), inputs.run("reference")
    results, unfused = narrow.run_function(plain), narrow.run_function(unfused_attention)
    if options["queries"] == options.get("keys", 1) or options.get("window") == 1:  # q and k do not matter
        expected, results, unfused = ({name: x[name] for name in ("out", "v")} for x in (expected, results, unfused))
    check_results(results, unfused, expected)
    assert bool(package) == ("documents" not in options or options.get("query_offset") == 0 or "keys" not in options)


LONG = {"batch": 2, "queries": 1500, "heads": 8, "kv_heads": 2, "head_dim": 128}


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 256}, {"documents": 200}, {"window": 256, "documents": 200}])
def test_long_rows_on_a_gpu(package, monkeypatch, options):
    """Many blocks of keys: as near to the truth as the other way, and the same bits every time, compiled too."""
    inputs = random_inputs(**LONG, **options, absent=WEIGHTS).to(torch.float64, "cuda")
    narrow = inputs.to(torch.bfloat16)
    results = narrow.run_function(plain)
    check_results(results, narrow.run_function(unfused_attention), inputs.run("reference"))
    assert {name for name, _, _ in package} == {
        "flash_attn_varlen_func" if "documents" in options else "flash_attn_func"
    }
    monkeypatch.undo()  # the record would be a break in the graph
    for function in [plain] * 5 + [torch.compile(plain, fullgraph="documents" not in options)]:
        for name, again in narrow.run_function(function).items():
            assert torch.equal(again, results[name]), name


@pytest.mark.gpu
def test_equals_scaled_dot_product_attention_on_a_gpu(package, monkeypatch):
    inputs = random_inputs(**LONG, window=256, absent=WEIGHTS).to(torch.float64, "cuda").to(torch.bfloat16)
    results = inputs.run_function(compose_attention)
    assert len(package) == 1
    monkeypatch.setattr(flash, "unavailable_reason", lambda q: "not now")
    for name, other in inputs.run_function(compose_attention).items():
        assert (results[name] - other).norm() <= 0.02 * other.norm(), name
    assert len(package) == 1
