"""Timing in turns, and peak memory of functions whose peak is known."""

import time

import pytest
import torch

from dcscale.bench import meter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIB = 2**20
NEVER = float("inf")


def mebibytes(number):
    return torch.empty(number * MIB, dtype=torch.int8, device=DEVICE)


@torch.library.custom_op("dcscale_tests::with_scratch", mutates_args=())
def with_scratch(x: torch.Tensor) -> torch.Tensor:
    scratch = mebibytes(6)
    del scratch
    return torch.empty_like(x)


def test_the_peak_is_the_memory_held_at_once():
    before = mebibytes(16)  # not counted

    def run():
        first, second = mebibytes(3), mebibytes(4)
        del first
        third = mebibytes(2)
        return before, second, third

    assert meter.peak_bytes(run, DEVICE) == 7 * MIB


def test_memory_inside_a_custom_operator_counts():
    x = mebibytes(1)
    assert meter.peak_bytes(lambda: with_scratch(x), DEVICE) == 6 * MIB


def test_memory_of_a_backward_pass_counts():
    x = torch.zeros(MIB // 4, device=DEVICE, requires_grad=True)

    def run():
        y = x.exp()  # kept for backward
        torch.autograd.grad(y.sum(), x)

    assert 2 * MIB <= meter.peak_bytes(run, DEVICE) < 2.1 * MIB + 3 * 512  # y and the gradient, and scalars


def test_runs_take_turns():
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in "ab"}
    times, failures = meter.time_in_turns(runs, DEVICE, seconds=0, deadline=NEVER)
    assert calls == ["a", "b"] * meter.MIN_ROUNDS
    assert failures == {}
    assert {name: len(times_of_run) for name, times_of_run in times.items()} == dict.fromkeys("ab", meter.MIN_ROUNDS)
    assert all(milliseconds >= 0 for times_of_run in times.values() for milliseconds in times_of_run)


def test_rounds_fill_the_seconds_up_to_the_maximum():
    times, _ = meter.time_in_turns({"a": lambda: time.sleep(0.01)}, "cpu", seconds=0.1, deadline=NEVER)
    assert meter.MIN_ROUNDS < len(times["a"]) <= 10
    assert min(times["a"]) >= 10
    times, _ = meter.time_in_turns({"a": lambda: None}, "cpu", seconds=60, deadline=NEVER)
    assert len(times["a"]) == meter.MAX_ROUNDS


def test_after_the_deadline_there_is_one_round():
    times, _ = meter.time_in_turns({"a": lambda: None}, "cpu", seconds=60, deadline=time.monotonic() - 1)
    assert len(times["a"]) == 1
    assert meter.time_in_turns({}, "cpu", seconds=60, deadline=NEVER) == ({}, {})


def test_a_gpu_is_kept_busy_until_a_call_is_launched(monkeypatch):
    """With a GPU that only takes down what it is asked for."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            queue.append("event")

        def synchronize(self):
            queue.append("wait")

        def elapsed_time(self, end):
            return 7.0

    class Cache:
        def zero_(self):
            queue.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: Cache())
    runs = {"a": lambda: queue.append("run")}
    times, _ = meter.time_in_turns(runs, "cuda", seconds=0, deadline=time.monotonic() - 1, flushes=3)
    assert times == {"a": [7.0]}
    assert queue == ["flush", "flush", "flush", "event", "run", "event", "wait"]
    queue.clear()
    assert meter.gpu_clock()(runs["a"]) == 7.0
    assert queue == ["flush", "event", "run", "event", "wait"]


def test_a_run_that_does_not_fit_into_memory_is_skipped():
    calls = []

    def grows():
        calls.append(1)
        if len(calls) == 2:
            torch.empty(2**55, dtype=torch.int8, device=DEVICE)

    times, failures = meter.time_in_turns({"a": grows, "b": lambda: None}, DEVICE, seconds=0, deadline=NEVER)
    assert list(times) == ["b"]
    assert len(times["b"]) == meter.MIN_ROUNDS
    assert failures["a"].startswith("out of memory: ")
    assert len(calls) == 2


def test_any_other_error_is_raised():
    with pytest.raises(ZeroDivisionError):
        meter.time_in_turns({"a": lambda: 1 / 0}, DEVICE, seconds=0, deadline=NEVER)


def test_available_memory_is_limited_by_the_container(tmp_path):
    assert meter.available_bytes(DEVICE) > 0
    unlimited = meter.available_bytes("cpu", cgroup=tmp_path)
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert meter.available_bytes("cpu", cgroup=tmp_path) == pytest.approx(unlimited, rel=0.5)
    (tmp_path / "memory.max").write_text("3000\n")
    assert meter.available_bytes("cpu", cgroup=tmp_path) == 2000
