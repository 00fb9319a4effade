"""Scratch memory that is not given depends on the device's total memory and the shapes only."""

import types

import pytest
import torch

from dcscale.ops import compose_attention
from dcscale.ops.compose import api, scratch
from dcscale.ops.compose.custom_op import SCRATCH_BYTES, Call
from dcscale.ops.compose.scratch import default_scratch_bytes, derived_scratch_bytes, total_memory
from dcscale.ops.compose.weights import ComposeWeights
from dcscale.ops.flash import assume_constant_result

pytest.importorskip("triton", reason="triton is not installed")
from dcscale.ops.compose.triton import staging

MIB, GIB = 2**20, 2**30
LARGE = {"batch": 1, "queries": 4096, "keys": 4096, "heads": 32, "window": None, "element_size": 2}


def derived(memory=80 * GIB, **changes):
    return derived_scratch_bytes(memory, **{**LARGE, **changes})


@pytest.mark.parametrize(("heads", "window", "batch"), [(32, None, 1), (16, None, 8), (32, 256, 4), (8, 256, 4)])
def test_a_backward_pass_that_fits_is_one_chunk(heads, window, batch):
    found = derived(1000 * GIB, heads=heads, window=window, batch=batch)

    def normal(*shape):
        return torch.empty(batch, 4096, *shape, device="meta", dtype=torch.bfloat16)

    weights = ComposeWeights(*(normal(*shape) for shape in ((2, heads), (2, heads), (heads,)) * 2))
    q, k, v = (normal(heads, 64) for _ in range(3))
    attention = staging.StagedAttention(Call(q, k, v, weights, weights, window=window, scratch_bytes=found))
    assert len(attention.backward_chunks) == 1
    attention = staging.StagedAttention(Call(q, k, v, weights, weights, window=window, scratch_bytes=found * 4 // 5))
    assert len(attention.backward_chunks) > 1


def test_the_memory_of_well_known_models():
    assert derived() == 3413 * MIB  # of 5,888 for all queries and keys
    assert derived(batch=8) == derived()
    assert derived(heads=16, queries=2048, keys=2048) == 768 * MIB
    assert derived(window=256) == 552 * MIB  # all blocks of 384 keys
    assert derived(window=256, batch=4) == 4 * derived(window=256)
    assert derived(window=256, element_size=4) == 936 * MIB


def test_more_of_anything_never_makes_less_scratch():
    larger = {
        "queries": (1, 100, 1000, 4096, 40_000),
        "keys": (1, 100, 4096, 40_000),
        "batch": (1, 2, 8),
        "heads": (4, 8, 16, 64),
        "window": (1, 256, 1000, 4096, None),
        "element_size": (2, 4, 8),
    }
    for name, values in larger.items():
        sizes = [derived(2000 * GIB, **{name: value}) for value in values]
        assert sizes == sorted(sizes), name
        assert sizes[0] < sizes[-1], name
    sizes = [derived(memory * GIB) for memory in (1, 8, 16, 24, 40, 80)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) > 3


@pytest.mark.parametrize("memory", [1, 6 * GIB, 24 * GIB, 24 * GIB + 1, 80 * GIB - 12345])
@pytest.mark.parametrize("length", [1, 4096, 100_000])
@pytest.mark.parametrize("window", [None, 256])
def test_scratch_is_bounded_by_the_memory(memory, length, window):
    found = derived(memory, queries=length, keys=length, window=window)
    assert found % MIB == 0
    assert SCRATCH_BYTES <= found <= max(memory / 24, SCRATCH_BYTES)


def test_a_window_that_sees_everything_is_no_window():
    assert derived(window=4096) == derived() > derived(window=256)


def test_a_cpu_has_the_default():
    assert derived(None) == SCRATCH_BYTES == 256 * MIB
    assert total_memory("cpu", None) is None
    q = k = torch.empty(1, 4096, 32, 128, device="meta")
    assert default_scratch_bytes(q, k, None, True) == SCRATCH_BYTES


def test_a_gpu_is_asked_for_its_total_memory(monkeypatch):
    properties = {0: types.SimpleNamespace(total_memory=80 * GIB), 1: types.SimpleNamespace(total_memory=16 * GIB)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.get)
    assert [total_memory("cuda", index) for index in (0, 1)] == [80 * GIB, 16 * GIB]


def test_the_shapes_of_a_call_are_used(monkeypatch):
    monkeypatch.setattr(scratch, "total_memory", lambda device_type, index: 80 * GIB)
    q = torch.empty(2, 4096, 32, 128, device="meta", dtype=torch.bfloat16)
    k = torch.empty(2, 8192, 8, 128, device="meta", dtype=torch.bfloat16)
    assert default_scratch_bytes(q, k, None, True) == derived(keys=8192, batch=2)
    for causal in (True, False):
        expected = derived(keys=8192, batch=2, window=256, causal=causal)
        assert default_scratch_bytes(q, k, 256, causal) == expected


def test_a_window_on_both_sides_needs_more():
    assert derived(window=256, causal=False) == pytest.approx(derived(window=256) * (2 * 256 + 128) / (256 + 128), 0.01)
    assert derived(causal=False) == derived()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_call_takes_what_its_device_and_shapes_give(monkeypatch, compiled):
    """Also where torch.compile traces the call, as on a GPU with 1000 GiB."""
    used, keys = [], 2100

    @assume_constant_result
    def memory(device_type, index):
        return 1000 * GIB

    monkeypatch.setattr(scratch, "total_memory", memory)
    monkeypatch.setitem(
        api._IMPLEMENTATIONS, "chunked", lambda call: used.append(call.scratch_bytes) or call.q.mul(1.0)
    )
    q = torch.zeros(1, 2000, 32, 128, dtype=torch.bfloat16)
    k = torch.zeros(1, keys, 8, 128, dtype=torch.bfloat16)

    def attend(q, k):
        return compose_attention(q, k, k, causal=False, window=900, query_offset=9, backend="chunked")

    if compiled:
        attend = torch.compile(attend, backend="eager", fullgraph=True)
    attend(q, k)
    shape = {"queries": 2000, "keys": keys, "window": 900, "causal": False}
    assert used == [derived(1000 * GIB, **shape)]
    assert used[0] > SCRATCH_BYTES
