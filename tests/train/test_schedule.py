"""Learning rates, compared with values worked out by hand."""

import math

import pytest

from dcscale.config.schema import ScheduleConfig
from dcscale.train.optimizer import learning_rate


def rates(steps=100, peak=2.0, **settings):
    config = ScheduleConfig(**settings)
    return [learning_rate(config, peak, steps, step) for step in range(steps)]


def test_warm_up_is_linear_and_reaches_the_peak():
    r = rates(warmup_steps=10, kind="constant")
    assert r[:10] == pytest.approx([0.2 * n for n in range(1, 11)])
    assert set(r[10:]) == {2.0}


def test_cosine():
    r = rates(warmup_steps=20, kind="cosine", final_ratio=0.1)
    assert r[19] == 2.0
    assert r[59] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))  # half way
    assert r[39] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert r[-1] == pytest.approx(0.2)
    assert r[19:] == sorted(set(r[19:]), reverse=True)


def test_warm_up_stable_decay():
    r = rates(warmup_steps=10, kind="wsd", decay_steps=40, final_ratio=0.0)
    assert set(r[9:60]) == {2.0}
    assert r[79] == pytest.approx(1.0)
    assert r[-1] == pytest.approx(0.0)


def test_the_wsd_decay_defaults_to_a_fifth_of_the_run_and_can_be_absent():
    assert rates(warmup_steps=0, kind="wsd", final_ratio=0.5)[79:82] == pytest.approx([2.0, 1.95, 1.9])
    assert set(rates(warmup_steps=0, kind="wsd", decay_steps=0)) == {2.0}


def test_no_warm_up():
    assert rates(warmup_steps=0, kind="constant")[0] == 2.0
