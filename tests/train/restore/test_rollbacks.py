"""What a run passes over after a checkpoint is remembered next to it, and belongs to that checkpoint only."""

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import MARKER
from dcscale.train.restore.rollbacks import FORMAT, ROLLBACKS, Rollback, record_rollback, rollbacks_to
from dcscale.train.restore.start import Start, StartKind
from dcscale.train.state import TrainState
from dcscale.train.trainer import Trainer

SKIPPED = [{"name": "shard-000001.tar", "sha256": "ab", "tokens": 10, "reason": "it is gone"}]


def checkpoint_of(folder, content="one"):
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(content)
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return checkpoint_of(tmp_path / "checkpoints/step-00000010")


def rollback_to(checkpoint, sequences=120):
    """From a spike in step 15 with 8 sequences a step."""
    current = TrainState(step=14, sequences=sequences, skipped=SKIPPED)
    return Rollback.of(checkpoint, TrainState(step=10, sequences=80), current, 8, "loss 9")


def test_what_is_passed_over_ends_with_the_spike(checkpoint):
    state = TrainState(step=10, sequences=80, passed_over=[{"step": 3, "reason": "", "first": 0, "end": 8}])
    rollback_to(checkpoint).apply(state)
    assert (state.step, state.sequences, state.skipped) == (10, 128, SKIPPED)
    assert state.passed_over[1:] == [{"step": 15, "reason": "loss 9", "first": 80, "end": 128}]


def test_the_scratch_memory_stays_that_of_this_start(checkpoint):
    """A checkpoint of an earlier start may have another; the next one must say what its steps were computed with."""
    nothing, dropped = SimpleNamespace(load=lambda saved: None, clock=SimpleNamespace(pop=lambda: None)), []
    trainer = SimpleNamespace(
        engine=nothing,
        state=TrainState(step=14, scratch_mib=7),
        checkpointer=SimpleNamespace(latest=None),
        hooks=[],
        _reporter=SimpleNamespace(drop_after=dropped.append),
    )
    start = Start(StartKind.RESUME, TrainState(step=10, scratch_mib=64), checkpoint, saved=object())
    Trainer.go_back_to(trainer, start)
    assert (trainer.state.step, trainer.state.scratch_mib, trainer.checkpointer.latest) == (10, 7, checkpoint)
    assert dropped == [10]


def test_a_resume_finds_the_rollbacks_to_its_checkpoint_in_order(tmp_path, checkpoint):
    assert rollbacks_to(tmp_path, checkpoint) == []
    written = [rollback_to(checkpoint), rollback_to(checkpoint, 136)]
    for rollback in written:
        record_rollback(tmp_path, rollback)
    assert rollbacks_to(tmp_path, checkpoint) == written


def test_another_checkpoint_even_of_that_name_passes_over_nothing(tmp_path, checkpoint):
    record_rollback(tmp_path, rollback_to(checkpoint))
    assert rollbacks_to(tmp_path, checkpoint_of(tmp_path / "checkpoints/step-00000020", "two")) == []
    (checkpoint / MARKER).write_text("written again")
    assert rollbacks_to(tmp_path, checkpoint) == []


def test_a_moved_run_keeps_them(tmp_path, checkpoint):
    record_rollback(tmp_path, rollback_to(checkpoint))
    moved = tmp_path.rename(tmp_path.with_name(f"{tmp_path.name}-moved"))
    assert len(rollbacks_to(moved, moved / "checkpoints/step-00000010")) == 1


def content_of(checkpoint, **changes):
    return {"format": FORMAT, "rollbacks": [{**asdict(rollback_to(checkpoint)), **changes}]}


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda content: [], "must be a JSON object, but is a list"),
        (lambda content: {**content, "format": 9}, "has the format 9 and rollbacks list"),
        (lambda content: {**content, "rollbacks": {}}, "has the format 1 and rollbacks dict"),
        (
            lambda content: {**content, "rollbacks": [3]},
            "has an entry that is not of the form checkpoint, marker_sha256, ",
        ),
        (lambda content: {**content, "rollbacks": [{"step": 1}]}, "has an entry that is not of the form checkpoint, "),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, checkpoint, damage, problem):
    (tmp_path / ROLLBACKS).write_text(json.dumps(damage(content_of(checkpoint))))
    with pytest.raises(CheckpointError, match="rollbacks.json") as caught:
        rollbacks_to(tmp_path, checkpoint)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"end": "128"}, "has an entry with end = '128', which must be int"),
        ({"first": True}, "has an entry with first = True, which must be int"),
        ({"skipped": None}, "has an entry with skipped = None, which must be list"),
        ({"first": 128}, "passes over sequences 128 up to 128"),
        ({"first": -1}, "passes over sequences -1 up to 128"),
    ],
)
def test_an_impossible_entry_is_refused_with_the_way_out(tmp_path, checkpoint, changes, problem):
    path = tmp_path / ROLLBACKS
    path.write_text(json.dumps(content_of(checkpoint, **changes)))
    with pytest.raises(CheckpointError) as caught:
        record_rollback(tmp_path, rollback_to(checkpoint))
    assert str(caught.value) == (
        f"{path} {problem}, but dcscale has not written that: restore it from a copy, or remove it to train on the "
        "sequences that the run had passed over"
    )


def test_a_disk_that_fails_is_an_error_of_the_checkpoint(tmp_path, checkpoint):
    with pytest.raises(CheckpointError, match="missing/rollbacks.json cannot be written: No such file or directory"):
        record_rollback(tmp_path / "missing", rollback_to(checkpoint))
