"""The self-test of the kernels: correct kernels pass, wrong ones are reported, and torch.compile skips it."""

import pytest
import torch

from dcscale.ops import choose_backend, compose_attention
from dcscale.ops.compose import api
from dcscale.ops.compose.triton import self_test
from dcscale.testing.attention import WEIGHTS, arguments, random_inputs

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton.staging import StagedAttention
from dcscale.ops.compose.triton.tiles import TABLE
from dcscale.testing.staged import DEVICE

pytestmark = pytest.mark.usefixtures("quick_interpreter")


@pytest.fixture(autouse=True)
def small_input(monkeypatch):
    """Interpreted tiles are slow, so use a small input. Clears the cached results."""
    if DEVICE == "cpu":
        shorten(monkeypatch, 40, 25, 20)
    self_test._run_once.cache_clear()
    yield
    self_test._run_once.cache_clear()


def shorten(monkeypatch, length, window, document):
    for name, size in (("LENGTH", length), ("WINDOW", window), ("DOCUMENT", document)):
        monkeypatch.setattr(self_test, name, size)


def failure(dtype=torch.float32, heads=2, absent=()):
    q, _, _, pre, post = call(dtype, heads, absent)
    return self_test.self_test_failure(q, pre, post)


def call(dtype=torch.float32, heads=2, absent=()):
    return arguments(random_inputs(batch=1, queries=5, heads=heads, absent=absent).to(dtype, DEVICE).tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absent", [[], ["pre.qg", "post.k1", "post.k2"], WEIGHTS[6:]], ids=["all", "some", "pre"])
def test_correct_kernels_pass(dtype, absent):
    assert failure(dtype, absent=absent) is None


def test_the_windowed_input_has_rows_of_its_own(monkeypatch):
    """With the tiles of every GPU, and in real size: several rows, and keys that only some of them see."""
    monkeypatch.undo()
    windowed, _ = self_test._inputs(self_test.Kernels("cpu", "torch.bfloat16", 1, 1, 8, (1,) * 6, (0,) * 6))
    for dtype, rank in ((torch.bfloat16, 2), (torch.bfloat16, 4), (torch.float32, "float32")):
        inputs = windowed._replace(q=windowed.q.to(dtype))
        for by_rank in TABLE.values():
            attention = StagedAttention(inputs, by_rank[rank])
            assert all(chunk.blocks > 1 for chunk in attention.backward_chunks)
            (unlimited,) = StagedAttention(inputs._replace(window=None), by_rank[rank]).backward_chunks
            assert unlimited.row_queries > by_rank[rank].product.queries


def spoil(monkeypatch, method, spoils):
    """Simulate a miscompiled kernel: clear what a method of StagedAttention has written if ``spoils`` its arguments."""
    original = getattr(StagedAttention, method)

    def spoiled(self, *arguments):
        original(self, *arguments)
        out = spoils(*arguments)
        if out is not None:
            out.zero_()

    monkeypatch.setattr(StagedAttention, method, spoiled)


def test_a_wrong_result_is_reported(monkeypatch):
    spoil(monkeypatch, "multiply_map", lambda name, *rest: rest[-2] if name == "dq" else None)
    assert "the gradient of q with a window and documents is off by 1.0e+00 of its norm, more than 1.0e-04" in failure()


@pytest.mark.parametrize("windowed", [True, False])
def test_a_result_that_is_wrong_only_with_or_without_a_window_is_reported(windowed, monkeypatch):
    """The smallest input of several rows."""
    if DEVICE == "cpu":
        shorten(monkeypatch, 130, 60, 70)

    def spoils(name, chunk, *rest):
        return rest[-2] if name == "out" and (chunk.blocks > 1) == windowed else None

    spoil(monkeypatch, "multiply_map", spoils)
    kind = "with a window and documents" if windowed else "without window"
    assert f"the output {kind} is off by 1.0e+00 of its norm" in failure(heads=1)


def test_a_failing_compiler_is_reported(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(StagedAttention, "multiply_rows", fail)
    assert failure() == "its kernels fail here: RuntimeError: ptxas died"


def test_it_runs_once_even_inside_torch_compile(monkeypatch):
    """As on a GPU, where the backend is chosen while torch.compile traces the model."""
    runs = []
    original = self_test._compare
    monkeypatch.setattr(self_test, "_compare", lambda kernels: runs.append(kernels) or original(kernels))
    monkeypatch.setattr(api, "_triton_unavailable_reason", self_test.self_test_failure)
    q, k, v, pre, post = call()

    def function(q, k, v, *weights):
        pre, post = (type(pre_)(*part) for pre_, part in ((pre0, weights[:6]), (pre0, weights[6:])))
        return 2 * compose_attention(q, k, v, pre, post, backend="triton")

    pre0 = pre
    result = torch.compile(function, backend="aot_eager", fullgraph=True)(q, k, v, *pre, *post)
    assert torch.equal(result, function(q, k, v, *pre, *post))
    choose_backend("triton", q, pre, post)
    assert len(runs) == 1


def test_grouped_heads_have_a_test_of_their_own(monkeypatch):
    tested = []
    monkeypatch.setattr(self_test, "_compare", tested.append)
    q, _, _, pre, post = call()
    assert self_test.self_test_failure(q, pre, post) is None
    assert self_test.self_test_failure(q, pre, post, kv_heads=1) is None
    assert [kernels.kv_heads for kernels in tested] == [2, 1]


def test_a_result_that_is_wrong_only_with_kept_maps_is_reported(monkeypatch):
    original = StagedAttention.backward

    def backward(self, dout_BTHD, log_sums, kept=()):
        if kept:
            kept[0].latents.zero_()
        return original(self, dout_BTHD, log_sums, kept)

    monkeypatch.setattr(StagedAttention, "backward", backward)
    assert "pre.q2 with a window and kept maps is off by" in failure()


def test_running_out_of_memory_says_nothing_about_the_kernels(monkeypatch):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StagedAttention, "multiply_rows", fail)
    with pytest.raises(torch.OutOfMemoryError):
        failure()
    monkeypatch.undo()
