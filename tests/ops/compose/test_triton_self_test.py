"""The self-test of the kernels: correct kernels pass, wrong ones are reported, and torch.compile skips it."""

import pytest
import torch

from dcscale.ops import choose_backend, compose_attention
from dcscale.ops.compose import api
from dcscale.ops.compose.triton import self_test
from dcscale.testing.attention import WEIGHTS, arguments, random_inputs

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton.staging import StagedAttention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_input(monkeypatch):
    """Interpreted tiles are slow, so use a small input. Clears the cached results."""
    if DEVICE == "cpu":
        for name, size in (("LENGTH", 40), ("WINDOW", 25), ("DOCUMENT", 20)):
            monkeypatch.setattr(self_test, name, size)
    self_test._run_once.cache_clear()
    yield
    self_test._run_once.cache_clear()


def call(dtype=torch.float32, absent=()):
    return arguments(random_inputs(batch=1, queries=5, heads=2, absent=absent).to(dtype, DEVICE).tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("absent", [[], ["pre.qg", "post.k1", "post.k2"], WEIGHTS[6:]], ids=["all", "some", "pre"])
def test_correct_kernels_pass(dtype, absent):
    q, _, _, pre, post = call(dtype, absent)
    assert self_test.self_test_failure(q, pre, post) is None


def test_a_wrong_result_is_reported(monkeypatch):
    """Simulates a miscompiled kernel: one backward launch does not write its result."""
    original = StagedAttention.launch

    def launch(self, kernel, tensors, *rest, **constants):
        original(self, kernel, tensors, *rest, **constants)
        if constants.get("POST") is False:
            tensors[4].zero_()

    monkeypatch.setattr(StagedAttention, "launch", launch)
    q, _, _, pre, post = call()
    assert "the gradient of q is off by 1.0e+00 of its norm, more than 1.0e-04" in self_test.self_test_failure(
        q, pre, post
    )


def test_a_failing_compiler_is_reported(monkeypatch):
    def launch(*_, **__):
        raise RuntimeError("ptxas died")

    monkeypatch.setattr(StagedAttention, "launch", launch)
    q, _, _, pre, post = call()
    assert self_test.self_test_failure(q, pre, post) == "its kernels fail here: RuntimeError: ptxas died"


def test_it_runs_once_even_inside_torch_compile(monkeypatch):
    """As on a GPU, where the backend is chosen while torch.compile traces the model."""
    runs = []
    original = self_test._compare
    monkeypatch.setattr(self_test, "_compare", lambda kernels: runs.append(kernels) or original(kernels))
    monkeypatch.setattr(
        api, "_triton_unavailable_reason", lambda q, pre, post: self_test.self_test_failure(q, pre, post)
    )
    q, k, v, pre, post = call()

    def function(q, k, v, *weights):
        pre, post = (type(pre_)(*part) for pre_, part in ((pre0, weights[:6]), (pre0, weights[6:])))
        return 2 * compose_attention(q, k, v, pre, post, backend="triton")

    pre0 = pre
    result = torch.compile(function, backend="aot_eager", fullgraph=True)(q, k, v, *pre, *post)
    assert torch.equal(result, function(q, k, v, *pre, *post))
    choose_backend("triton", q, pre, post)
    assert len(runs) == 1
