"""Runs on a mixture with data workers: same losses as without, also after a resume; epochs; changed data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dcscale.observe import read_metrics

pytestmark = pytest.mark.distributed

# In its own process, because daemon processes, such as those of run_distributed, cannot start others.
CODE = """
import sys
from pathlib import Path
from dcscale.checkpoint import CheckpointError
from dcscale.parallel import stop_distributed
from dcscale.testing.runs import tiny_config, train_here

if __name__ == "__main__":
    folder, shards = map(Path, sys.argv[1:])
    sources = [{"name": part, "path": str(shards / part), "weight": weight}
               for part, weight in (("train", 0.7), ("validation", 0.3))]

    def train(name, *more):
        data = ["data.train=''", f"data.sources={sources}", "validation.interval=0"]
        config = tiny_config(folder / name, shards, *data, *more)
        train_here(config)

    train("whole")
    train("resumed", "train.stop_after=3", "data.workers=2")
    train("resumed", "data.workers=1", "train.stop_after=6")
    try:
        train("resumed", "data.sources[1].weight=0.7")
    except CheckpointError as error:
        print(error)
    train("resumed", "data.sources[1].weight=0.7", "checkpoint.allow_data_change=true", "train.stop_after=7")
    train("resumed", "data.sources[1].weight=0.7")
    stop_distributed()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory, shards):
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-c", CODE, str(folder), str(shards)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    (folder / "refusal").write_text(done.stdout)
    return folder


def records(folder: Path):
    return [r for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def state(folder: Path, step: int):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def test_workers_and_stops_change_nothing(runs):
    whole, resumed = (
        [(r["step"], r["loss"], r["grad_norm"]) for r in records(runs / name)] for name in ("whole", "resumed")
    )
    assert whole[:6] == resumed[:6]
    assert whole[6] != resumed[6], "the last steps use another mixture"


def test_epochs_of_each_source_are_recorded(runs):
    """8 steps of 8 sequences: 45 of 7 in 10, and 19 of 3 in 10."""
    first, last = records(runs / "whole")[0], records(runs / "whole")[-1]
    assert last["data_epoch/train"] / first["data_epoch/train"] == pytest.approx(45 / 6)
    assert last["data_epoch/validation"] / first["data_epoch/validation"] == pytest.approx(19 / 2)
    assert "data_epoch" not in last


def test_the_data_state_is_the_number_of_sequences_and_the_identity(runs):
    before, after = state(runs / "whole", 8), state(runs / "resumed", 8)
    assert before["sequences"] == after["sequences"] == 64
    assert before["data_identity"]["weights"] == [7, 3]
    assert after["data_identity"]["weights"] == [1, 1]


def test_another_mixture_is_rejected_unless_allowed(runs):
    message = (runs / "refusal").read_text()
    assert "the data's weights was [7, 3] in the checkpoint and is [1, 1] now: the sequences would differ" in message
    assert "checkpoint.allow_data_change=true" in message
