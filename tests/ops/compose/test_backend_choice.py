"""When the fused backend runs, and what is said when it cannot. Needs neither triton nor a GPU."""

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


def refused(call, message, monkeypatch=None):
    with pytest.raises(ValueError, match=f"backend 'triton' cannot run here: {message}.*; use 'auto', or 'chunked'"):
        compose_attention(*call, backend="triton")


def test_not_installed(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(call, "triton is not installed")


def test_no_gpu(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    refused(call, "it needs an NVIDIA GPU .or TRITON_INTERPRET=1, for tests., and q is on cpu")


def test_double_precision():
    refused(arguments(random_inputs(queries=3).tensors), "it computes in float32, and q is torch.float64")


def test_high_rank():
    call = arguments(random_inputs(batch=1, queries=3, rank=5).to(torch.float32).tensors)
    refused(call, r"it takes ranks up to 4, and pre.q1 has shape \(1, 3, 5, 4\)")


class OnGPU:
    """As much of a tensor as the choice looks at."""

    is_cuda, dtype, device = True, torch.bfloat16, torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU whose kernels are right; what they are checked for is in the list."""
    checked = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(api, "self_test_failure", lambda *call: checked.append(call))
    return checked


def test_automatic_choice_on_a_gpu(call, gpu):
    chosen, why = choose_backend("auto", OnGPU, *call[3:])
    assert chosen == "triton"
    assert "tried on this GPU" in why
    assert gpu == [(OnGPU, *call[3:])]


def test_gpus_that_are_too_old(call, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    chosen, why = choose_backend("auto", OnGPU, *call[3:])
    assert chosen == "chunked"
    assert "not triton: it needs compute capability 8.0, and the GPU has 7.5" in why
    assert not gpu


def test_kernels_that_were_compiled_wrong_are_not_used(call, gpu, monkeypatch):
    monkeypatch.setattr(api, "self_test_failure", lambda *call: "the output is off by 1.0")
    chosen, why = choose_backend("auto", OnGPU, *call[3:])
    assert chosen == "chunked"
    assert "not triton: the output is off by 1.0" in why
    with pytest.raises(ValueError, match="'triton' cannot run here: the output is off by 1.0; use 'auto', or 'chunk"):
        choose_backend("triton", OnGPU, *call[3:])


def test_gpus_of_another_make(call, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "made for NVIDIA GPUs" in choose_backend("auto", OnGPU, *call[3:])[1]


def test_automatic_choice_on_a_cpu(call):
    """Also where the kernels could be interpreted: that is for tests, and slow."""
    chosen, why = choose_backend("auto", *call[:1], *call[3:])
    assert chosen == "chunked"
    assert "not triton: it needs an NVIDIA GPU" in why


def test_tiles_of_an_unknown_gpu_are_those_of_the_one_before():
    assert tiles_for(89, 2) == TABLE[80][2]
    assert tiles_for(121, 2) == TABLE[100][2]
    with pytest.raises(ValueError, match="compute capability 75, expected at least 80; use backend 'chunked'"):
        tiles_for(75, 2)


@pytest.mark.parametrize("capability", TABLE)
def test_every_rank_has_tiles(capability):
    for rank in range(MAX_RANK + 1):
        assert tiles_for(capability, rank) in TABLE[capability].values()
    assert tiles_for(capability, 0) == tiles_for(capability, 1) == TABLE[capability][2]
    assert tiles_for(capability, 3) == TABLE[capability][4]


@pytest.mark.parametrize("capability", TABLE)
def test_every_thread_has_elements_of_its_own(capability):
    for tile in (tile for tiles in TABLE[capability].values() for tile in tiles):
        assert tile.queries * tile.keys >= 32 * tile.warps
        assert all(number & (number - 1) == 0 for number in tile)


def test_the_module_imports_without_triton():
    """It is imported with dcscale.ops, where triton may be missing."""
    assert "triton" not in vars(op)
