"""train.compile does not change what blocks compute."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from dcscale.observe import read_metrics
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config, train_here

pytestmark = pytest.mark.distributed


def train_and_count_graphs(configs):
    """Trains each config; returns the number of compiled graphs after each of them."""
    # aot_eager traces the same forward and backward graphs as the default backend, without half a minute of code
    # generation.
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager")
    counts = []
    for config in configs:
        train_here(config)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    return counts


def test_compiled_blocks_train_like_eager_blocks(tmp_path, shards):
    common = ["train.steps=3", "validation.interval=0", "log.compose_interval=1"]
    eager = tiny_config(tmp_path / "eager", shards, *common)
    compiled = tiny_config(tmp_path / "compiled", shards, *common, "train.compile=true")
    ((eager_graphs, graphs),) = run_distributed(train_and_count_graphs, 1, [eager, compiled])
    assert eager_graphs == 0
    assert graphs > 0

    expected, found = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("eager", "compiled"))
    assert [record["step"] for record in found] == [1, 2, 3]
    distances = {f"compose/{side}/layer_{layer:02d}" for side in ("pre", "post") for layer in (0, 1)}
    for name in ("loss", "grad_norm", *distances):
        assert [record.get(name) for record in found] == pytest.approx(
            [record[name] for record in expected], rel=1e-5
        ), name
