"""When the Triton backend is chosen, and the reason that is reported otherwise. Needs neither triton nor a GPU."""

import importlib.util

import pytest
import torch

from dcscale.ops import choose_backend, compose_attention
from dcscale.ops.compose import api
from dcscale.ops.compose.triton import op
from dcscale.ops.compose.triton.tiles import MAX_RANK, TABLE, tiles_for
from dcscale.testing.attention import arguments, random_inputs


@pytest.fixture
def call():
    return arguments(random_inputs(batch=1, queries=3, heads=2).to(torch.float32).tensors)


def assert_unavailable(call, message):
    with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: {message}.*; use 'auto' or 'chunked'"):
        compose_attention(*call, backend="triton")


def test_not_installed(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_unavailable(call, "triton is not installed")


def test_no_gpu(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert_unavailable(call, "it needs an NVIDIA GPU .or TRITON_INTERPRET=1, for tests., but q is on cpu")


def test_double_precision():
    assert_unavailable(arguments(random_inputs(queries=3).tensors), "it computes in float32, but q is torch.float64")


def test_high_rank():
    call = arguments(random_inputs(batch=1, queries=3, rank=5).to(torch.float32).tensors)
    assert_unavailable(call, r"it supports ranks up to 4, but pre.q1 has shape \(1, 3, 5, 4\)")


class OnGPU:
    """The attributes of a tensor that choose_backend reads."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """Fakes a GPU whose kernels pass the self-test; returns the list of tested calls."""
    tested = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(api, "self_test_failure", lambda *call: tested.append(call))
    return tested


def test_automatic_choice_on_a_gpu(call, gpu):
    chosen, why = choose_backend("auto", OnGPU, *call[3:])
    assert chosen == "triton"
    assert "passed their self-test" in why
    assert gpu == [(OnGPU, *call[3:], None)]


def test_gpus_that_are_too_old_use_chunked(call, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    chosen, why = choose_backend("auto", OnGPU, *call[3:])
    assert chosen == "chunked"
    assert "not triton: it needs compute capability 8.0, but the GPU has 7.5" in why
    assert not gpu


def test_kernels_that_fail_their_self_test_are_not_used(call, gpu, monkeypatch):
    monkeypatch.setattr(api, "self_test_failure", lambda *call: "the output is off by 1.0")
    chosen, why = choose_backend("auto", OnGPU, *call[3:])
    assert chosen == "chunked"
    assert "not triton: the output is off by 1.0" in why
    with pytest.raises(ValueError, match="'triton' cannot run here: the output is off by 1.0; use 'auto' or 'chunk"):
        choose_backend("triton", OnGPU, *call[3:])


def test_gpus_of_another_vendor(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "supports NVIDIA GPUs only" in choose_backend("auto", OnGPU, *call[3:])[1]


def test_automatic_choice_on_a_cpu(call):
    """Even if the kernels could be interpreted, which is slow and for tests."""
    chosen, why = choose_backend("auto", *call[:1], *call[3:])
    assert chosen == "chunked"
    assert "not triton: it needs an NVIDIA GPU" in why


def test_an_unknown_gpu_uses_the_tiles_of_the_newest_older_one():
    assert tiles_for(89, 2) == TABLE[80][2]
    assert tiles_for(103, 2) == TABLE[100][2]
    assert tiles_for(121, 2) == TABLE[120][2]
    with pytest.raises(ValueError, match="compute capability 75, expected at least 80; use backend 'chunked'"):
        tiles_for(75, 2)


@pytest.mark.parametrize("capability", TABLE)
def test_every_rank_has_tiles(capability):
    for rank in range(MAX_RANK + 1):
        assert tiles_for(capability, rank) in TABLE[capability].values()
    assert tiles_for(capability, 0) == tiles_for(capability, 1) == TABLE[capability][2]
    assert tiles_for(capability, 3) == TABLE[capability][4]


@pytest.mark.parametrize("capability", TABLE)
def test_tiles_fit_into_each_other(capability):
    for tiles in TABLE[capability].values():
        queries, keys = tiles.block
        assert queries % tiles.backward.queries == 0
        assert tiles.backward.keys == keys
        assert tiles.product.queries % tiles.product.keys == tiles.product.queries % queries == 0
        assert tiles.product.keys % keys == 0


@pytest.mark.parametrize("capability", TABLE)
def test_every_thread_has_its_own_elements(capability):
    for tile in (tile for tiles in TABLE[capability].values() for tile in tiles[:3]):
        assert tile.queries * tile.keys >= 32 * tile.warps
        assert all(number & (number - 1) == 0 for number in tile)


def test_the_module_imports_without_triton():
    """dcscale.ops imports it, and triton may be missing."""
    assert "triton" not in vars(op)
