"""Metrics in TensorBoard."""

import re

from dcscale.observe.metrics import METRICS, TENSORBOARD_CHARTS, tensorboard_scalars


def test_tags_of_a_record():
    record = {"step": 3, "loss": 2.0, "mfu": None, "compose/pre/layer_00": 0.5, "data_epoch/web": 1.5}
    assert tensorboard_scalars(record) == {
        "loss/train": 2.0,
        "weights/compose/pre/layer_00": 0.5,
        "progress/data_epoch/web": 1.5,
    }


def test_every_chart_shows_tags_that_exist():
    tags = [metric.tag for metric in METRICS.values() if metric.tag]
    tags += ["weights/compose/pre/layer_00", "weights/compose/post/layer_00"]
    assert len(set(tags)) == len(tags)
    for titles in TENSORBOARD_CHARTS.values():
        for patterns in titles.values():
            for pattern in patterns:
                assert any(re.fullmatch(pattern, tag) for tag in tags), pattern
