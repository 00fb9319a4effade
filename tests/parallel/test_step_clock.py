"""The own time of a rank by phase. Waiting for other ranks is tested in tests/distributed/test_slow_rank.py."""

import threading
import time

import pytest
import torch
import torch.distributed as dist

from dcscale.parallel import PHASES
from dcscale.parallel.step_clock import StepClock


def fail_after(seconds):
    time.sleep(seconds)
    raise ValueError("an error of the update")


def test_a_phase_has_the_time_within_its_contexts_until_it_is_read():
    clock = StepClock(torch.device("cpu"))
    for _ in range(2):
        with clock.phase("backward"):
            time.sleep(0.02)
    with pytest.raises(ValueError, match="of the update"), clock.phase("update"):
        fail_after(0.02)
    own, waiting = clock.pop()
    times = dict(zip(PHASES, own, strict=True))
    assert times["data"] == times["forward"] == waiting == 0
    assert 0.04 <= times["backward"] < 1
    assert 0.02 <= times["update"] < 1
    assert clock.pop() == ([0.0] * 4, 0.0)


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_collectives_are_waiting_only_for_the_thread_that_calls_them(process_group):
    clock = StepClock(torch.device("cpu"))
    with clock.phase("backward"):
        dist.all_reduce(torch.ones(2))
    own, waiting = clock.pop()
    assert 0 < waiting < 1
    assert own[2] > 0
    with clock.phase("backward"):
        dist.all_reduce(torch.ones(2), async_op=True).wait()
    assert clock.pop()[1] > 0
    with clock.phase("backward"):
        thread = threading.Thread(target=lambda: dist.all_reduce(torch.ones(2)))
        thread.start()
        thread.join()
    assert clock.pop()[1] == 0


class Event:
    """A CUDA event of a device whose clock is ``now``, in seconds."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.time = None

    def record(self):
        self.time = Event.now

    def synchronize(self):
        assert self.time is not None

    def elapsed_time(self, end):
        return 1000 * (end.time - self.time)


def test_on_a_gpu_events_measure_forward_and_backward_and_the_update_begins_with_the_norm(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = StepClock(torch.device("cuda", 0))
    for phase, seconds in [("forward", 2.0), ("backward", 5.0), ("forward", 2.5), ("backward", 5.5)]:
        with clock.phase(phase):
            Event.now += seconds
    with clock.phase("update"):
        time.sleep(0.05)
        clock.device_caught_up()
        time.sleep(0.02)
    (data, forward, backward, update), waiting = clock.pop()
    assert (data, forward, backward) == (0, pytest.approx(4.5), pytest.approx(10.5))
    assert 0.02 <= update < 0.05 <= waiting < 1
    assert clock.pop() == ([0.0] * 4, 0.0)
