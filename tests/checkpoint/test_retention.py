"""Which checkpoints are kept."""

import json
import shutil

import pytest

from dcscale.checkpoint import checkpoints_of
from dcscale.checkpoint.checkpointer import discard, expired_checkpoints
from dcscale.checkpoint.layout import seal, step_name, step_of
from dcscale.config import CheckpointConfig


@pytest.fixture
def run(tmp_path):
    """Steps 10 to 80, all but 30 validated; the loss rises, except at 60."""
    for step, loss in zip(range(10, 90, 10), [1.0, 1.1, None, 1.3, 1.4, 0.9, 1.6, 1.6]):
        folder = tmp_path / "checkpoints" / step_name(step)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps({"format": 1, "validation_loss": loss}))
        seal(folder)
    return tmp_path


def kept(run, protected=(), **settings):
    gone = expired_checkpoints(run, CheckpointConfig(**settings), protected)
    return [step_of(p) for p in checkpoints_of(run) if p not in gone]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, [60, 70, 80]),
        ({"keep_last": 1}, [80]),
        ({"keep_last": 99}, list(range(10, 90, 10))),
        ({"keep_last": None}, list(range(10, 90, 10))),
        ({"keep_last": None, "keep_best": 1}, list(range(10, 90, 10))),
        ({"keep_last": 1, "keep_every": 20}, [20, 40, 60, 80]),
        ({"keep_last": 2, "keep_every": 30}, [30, 60, 70, 80]),
        ({"keep_last": 1, "keep_best": 1}, [60, 80]),
        ({"keep_last": 1, "keep_best": 3}, [10, 20, 60, 80]),
        ({"keep_last": 1, "keep_best": 6}, [10, 20, 40, 50, 60, 70, 80]),
        ({"keep_last": 1, "keep_every": 50, "keep_best": 2}, [10, 50, 60, 80]),
    ],
)
def test_last_every_and_best(run, settings, steps):
    assert kept(run, **settings) == steps


def test_a_protected_checkpoint_is_kept_however_its_path_is_spelled(run):
    spelled = run / "x" / ".." / "checkpoints" / step_name(20)
    (run / "x").mkdir()
    assert kept(run, [spelled], keep_last=1) == [20, 80]


def test_a_loss_of_nan_is_not_the_best(run):
    folder = run / "checkpoints" / step_name(20)
    (folder / "state.json").write_text('{"format": 1, "validation_loss": NaN}')
    seal(folder)
    assert kept(run, keep_last=1, keep_best=3) == [10, 40, 60, 80]


def test_an_incomplete_checkpoint_does_not_count_and_is_left_alone(run):
    (run / "checkpoints" / step_name(80) / "COMPLETE").unlink()
    (run / "checkpoints" / step_name(60) / "state.json").write_text("cut")
    assert kept(run, keep_last=1, keep_best=1) == [10, 60, 70, 80]


def test_a_checkpoint_is_renamed_before_its_files_are_removed(run, monkeypatch):
    seen = []

    def killed(folder):
        seen.append(folder.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        discard(run / "checkpoints" / step_name(20))
    assert seen == [".unfinished-step-00000020"]
    assert step_name(20) not in [p.name for p in checkpoints_of(run)]
