"""What a record shows in TensorBoard."""

import re

from dcscale.observe.metrics import BOARD_CHARTS, METRICS, board_values


def test_tags_of_a_record():
    record = {"step": 3, "loss": 2.0, "mfu": None, "compose/pre/layer_00": 0.5, "data_epoch/web": 1.5}
    assert board_values(record) == {
        "loss/train": 2.0,
        "weights/compose/pre/layer_00": 0.5,
        "progress/data_epoch/web": 1.5,
    }


def test_every_chart_shows_tags_that_exist():
    tags = [metric.board for metric in METRICS.values() if metric.board]
    tags += ["weights/compose/pre/layer_00", "weights/compose/post/layer_00"]
    assert len(set(tags)) == len(tags)
    for titles in BOARD_CHARTS.values():
        for patterns in titles.values():
            for pattern in patterns:
                assert any(re.fullmatch(pattern, tag) for tag in tags), pattern
