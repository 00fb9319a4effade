"""Saving a checkpoint: in the background of training, and on all ranks together or not at all."""

import json
import threading
import time
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file

from dcscale.checkpoint import Checkpointer, CheckpointError, checkpointer, checkpoints_of, find_checkpoint
from dcscale.checkpoint.checkpointer import quarantine
from dcscale.checkpoint.layout import corrupt_reason, read_marker
from dcscale.checkpoint.training_state import TrainingStateReader
from dcscale.config import CheckpointConfig
from dcscale.testing.distributed import SHAPES, on_threads, tiny_snapshot

RANKS = 2
FILES = [
    "config.yaml",
    "optimizer/rank-00000.safetensors",
    "optimizer/rank-00001.safetensors",
    "state.json",
    "weights/model-00001.safetensors",
    "weights/model.safetensors.index.json",
]


def save(saver, engine, step, **state):
    """Starts to save a state of this step."""
    engine.step = step
    saver.save(step, {"format": 1, "step": step, **state}, {"config.yaml": b"seen: true\n"})


def saved(run, *steps, ranks=RANKS, **settings):
    """Saves at each step and waits; returns the checkpointers of all ranks."""

    def each(engine):
        saver = Checkpointer(engine, run, CheckpointConfig(**settings))
        for step in steps:
            save(saver, engine, step)
        saver.wait()
        return saver

    return on_threads(ranks, each)


def failure(call, *arguments):
    with pytest.raises(CheckpointError) as error:
        call(*arguments)
    return str(error.value)


@pytest.mark.parametrize("background", [True, False])
def test_a_complete_checkpoint(tmp_path, background):
    first, second = saved(tmp_path, 3, background=background)
    folder = tmp_path / "checkpoints" / "step-00000003"
    assert first.latest == second.latest == find_checkpoint(tmp_path) == folder
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000003\n"
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000003"]
    assert sorted(read_marker(folder)) == FILES
    assert corrupt_reason(folder) is None
    assert json.loads((folder / "state.json").read_text())["step"] == 3
    assert first.written_bytes == sum((folder / name).stat().st_size for name in FILES)
    assert 0 < first.write_seconds < 30

    # The weights are the master weights, rounded.
    weights = load_file(folder / "weights" / "model-00001.safetensors")
    complete = tiny_snapshot(0, 1, 3)
    for name, shape in SHAPES.items():
        master = complete.tensors[name, "master", 0].view(shape)
        assert weights[name].equal(master.to(torch.bfloat16))
        assert not weights[name].float().equal(master)


def test_weights_are_read_in_batches(tmp_path):
    saved(tmp_path, 3)
    saved_state = TrainingStateReader(tmp_path / "checkpoints" / "step-00000003" / "optimizer")
    expected = dict(saved_state.weights(torch.float32))
    assert list(expected) == list(SHAPES)
    for batch_bytes in (1, 100):
        batched = dict(saved_state.weights(torch.float32, batch_bytes))
        assert list(batched) == list(SHAPES)
        assert all(batched[name].equal(expected[name]) for name in SHAPES)


def hold_writing(monkeypatch):
    """Makes every rank wait for the returned event before it writes."""
    go, write = threading.Event(), checkpointer.write_fragments

    def held(snapshot, folder):
        assert go.wait(30)
        return write(snapshot, folder)

    monkeypatch.setattr(checkpointer, "write_fragments", held)
    return go


def test_training_continues_while_it_is_written(tmp_path, monkeypatch):
    go = hold_writing(monkeypatch)

    def train(engine):
        saver = Checkpointer(engine, tmp_path, CheckpointConfig())
        save(saver, engine, 1)
        for engine.step in (2, 3, 4):
            saver.poll()
        during = saver.busy, saver.latest, checkpoints_of(tmp_path)
        engine.gather_objects(None)
        go.set()
        polls = 0
        while saver.busy:
            saver.poll()
            polls += 1
            time.sleep(0.001)
        return during, polls, saver.latest

    for during, polls, latest in on_threads(RANKS, train):
        assert during == (True, None, [])
        assert polls >= 4
        assert latest.name == "step-00000001"
    # It holds the state of its own step, not of the steps since.
    weights = load_file(tmp_path / "checkpoints" / "step-00000001" / "weights" / "model-00001.safetensors")
    assert weights["norm.weight"][0] == 1


def test_one_at_a_time(tmp_path, monkeypatch):
    go = hold_writing(monkeypatch)

    def train(engine):
        saver = Checkpointer(engine, tmp_path, CheckpointConfig())
        save(saver, engine, 1)
        threading.Timer(0.2, go.set).start()
        start = time.perf_counter()
        save(saver, engine, 2)
        waited, first = time.perf_counter() - start, saver.latest
        saver.wait()
        return waited, first.name, saver.latest.name

    for waited, first, second in on_threads(RANKS, train):
        assert waited > 0.15
        assert (first, second) == ("step-00000001", "step-00000002")


STAGES = {
    "copy": ("snapshot", 1),
    "write": ("write_fragments", 1),
    "read back": ("TrainingStateReader", 0),
    "weights": ("save_weights", 0),
    "rest": ("write_json", 0),
    "make durable": ("sync_tree", 0),
    "name": ("point_latest_at", 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_on_one_rank_fails_on_all_and_the_next_checkpoint_succeeds(tmp_path, monkeypatch, stage):
    name, broken_rank = STAGES[stage]
    saved(tmp_path, 1)

    def fail(*arguments):
        raise OSError("No space left on device")

    def train(engine):
        saver = Checkpointer(engine, tmp_path, CheckpointConfig(), find_checkpoint(tmp_path))
        original = getattr(checkpointer, name, None)
        if name == "snapshot" and engine.environment.rank == broken_rank:
            engine.snapshot = fail
        elif name == "write_fragments":
            broken = lambda copy, folder: fail() if copy.rank == broken_rank else original(copy, folder)  # noqa: E731
            monkeypatch.setattr(checkpointer, name, broken)
        elif original is not None:
            monkeypatch.setattr(checkpointer, name, fail)
        engine.gather_objects(None)
        message = failure(lambda: (save(saver, engine, 2), saver.wait()))
        kept = saver.latest.name, saver.busy
        engine.gather_objects(None)
        monkeypatch.undo()
        engine.__dict__.pop("snapshot", None)
        save(saver, engine, 3)
        saver.wait()
        return message, kept, saver.latest.name

    before = (tmp_path / "checkpoints" / "latest").read_text()
    for message, kept, latest in on_threads(RANKS, train):
        assert "step-00000002 was not written: " in message
        assert f"rank {broken_rank}: OSError: No space left on device" in message
        assert kept == ("step-00000001", False)
        assert latest == "step-00000003"
    assert before == "step-00000001\n"
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_part_that_does_not_fit_the_others_is_found_before_the_checkpoint_has_a_name(tmp_path, monkeypatch):
    write = checkpointer.write_fragments

    def cut(snapshot, folder):
        path = write(snapshot, folder)
        if snapshot.rank == 1:
            path.write_bytes(path.read_bytes()[:-4])
        return path

    monkeypatch.setattr(checkpointer, "write_fragments", cut)
    assert "rank-00001.safetensors cannot be read" in failure(saved, tmp_path, 1)
    assert checkpoints_of(tmp_path) == []


def test_too_little_free_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(checkpointer.shutil, "disk_usage", lambda folder: usage(416))
    # 29 parameters: three float32 values each, a bfloat16 weight each, and config.yaml.
    assert (29 * 12 + 29 * 2 + 11) == 417
    message = failure(saved, tmp_path, 1)
    assert (
        f"{tmp_path}/checkpoints has 416 bytes free, but the checkpoint takes 417: free some space, keep fewer"
        in message
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.setattr(checkpointer.shutil, "disk_usage", lambda folder: usage(417))
    saved(tmp_path, 1)


def test_the_checkpoint_resumed_from_is_not_written_again(tmp_path):
    saved(tmp_path, 1)
    folder = find_checkpoint(tmp_path)
    written_at = (folder / "COMPLETE").stat().st_mtime_ns

    def again(engine):
        saver = Checkpointer(engine, tmp_path / "." / "x" / "..", CheckpointConfig(), folder)
        save(saver, engine, 1)
        return saver.busy

    (tmp_path / "x").mkdir()
    assert on_threads(RANKS, again) == [False, False]
    assert (folder / "COMPLETE").stat().st_mtime_ns == written_at


def test_leftovers_are_removed_and_an_unknown_checkpoint_is_quarantined(tmp_path):
    saved(tmp_path, 1)
    root = tmp_path / "checkpoints"
    (root / ".unfinished-step-00000009" / "optimizer").mkdir(parents=True)
    (root / ".latest.x1y2").write_text("step")
    saved(tmp_path, 1)
    saved(tmp_path, 1)
    names = ["latest", "quarantined-step-00000001", "quarantined-step-00000001-2", "step-00000001"]
    assert sorted(p.name for p in root.iterdir()) == names
    assert quarantine(root / "step-00000001").name == "quarantined-step-00000001-3"


def test_old_checkpoints_that_cannot_be_removed_do_not_undo_the_new_one(tmp_path, monkeypatch):
    saved(tmp_path, 1)

    def fail(checkpoint):
        raise PermissionError(f"no right to remove {checkpoint.name}")

    monkeypatch.setattr(checkpointer, "discard", fail)
    message = failure(lambda: saved(tmp_path, 2, keep_last=1))
    assert (
        "step-00000002 was written, but older checkpoints were not removed: rank 0: PermissionError: no right"
        in message
    )
    assert find_checkpoint(tmp_path).name == "step-00000002"
