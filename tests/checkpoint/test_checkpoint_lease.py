"""A start that has lost the run folder to another changes nothing in it; disk errors can be told from others."""

import contextlib
import errno

import pytest
import torch

from dcscale.checkpoint import Checkpointer, CheckpointError, checkpointer, weights
from dcscale.checkpoint.layout import corrupt_reason, read_state
from dcscale.config import CheckpointConfig
from dcscale.files import may_succeed_later
from dcscale.lease import LeaseLostError
from dcscale.testing.distributed import on_threads

RANKS = 2


class LeaseLostAt:
    """A lease that is lost after so many checks."""

    def __init__(self, check):
        self.left = check

    def check(self):
        if self.left == 0:
            raise LeaseLostError("taken over by process 1 on n7")
        self.left -= 1


def tree(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def save(run, engine, step, lease=None, **settings):
    saver = Checkpointer(engine, run, CheckpointConfig(**settings), lease=lease if engine.environment.is_main else None)
    engine.step = step
    saver.save(step, {"format": 1, "step": step}, {"config.yaml": b"seen: true\n"})
    saver.wait()
    return saver


@pytest.mark.parametrize("checks", [0, 1, 2])
def test_a_checkpoint_is_not_published_without_the_lease(tmp_path, checks):
    on_threads(RANKS, lambda engine: save(tmp_path, engine, 1))
    (tmp_path / "checkpoints" / ".unfinished-step-00000009").mkdir()  # of the start that has the run folder now
    before = set(tree(tmp_path))
    lease = LeaseLostAt(checks)

    def each(engine):
        with pytest.raises(LeaseLostError) as lost:
            save(tmp_path, engine, 2, lease)
        return str(lost.value)

    assert on_threads(RANKS, each) == ["taken over by process 1 on n7"] * RANKS
    assert before <= set(tree(tmp_path))
    assert (tmp_path / "checkpoints" / "step-00000002").exists() == (checks == 2)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000001\n"
    assert (tmp_path / "checkpoints" / ".unfinished-step-00000009").exists() == (checks == 0)
    assert len(list((tmp_path / "checkpoints").glob(".unfinished-step-00000002-*"))) == (checks == 1)


class TakenOverAfter(LeaseLostAt):
    """A lease that is still held at so many checks, but taken over right after the last of them."""

    def __init__(self, checks, take_over):
        super().__init__(checks)
        self._take_over = take_over

    def check(self):
        super().check()
        if self.left == 0:
            self._take_over()


def test_who_loses_the_lease_after_a_check_does_not_touch_the_checkpoint_that_its_successor_writes(tmp_path):
    """The successor saves the same step, as it has resumed from an earlier one."""

    def each(engine):
        successor = Checkpointer(engine, tmp_path, CheckpointConfig())
        state = {"format": 1, "step": 2, "of": "the successor"}
        save(tmp_path, engine, 1)
        with contextlib.suppress(CheckpointError, LeaseLostError):  # its folder has been removed
            save(tmp_path, engine, 2, TakenOverAfter(2, lambda: successor.save(2, state, {})))
        successor.wait()
        return successor.latest

    (latest,) = on_threads(1, each)
    assert corrupt_reason(latest) is None
    assert read_state(latest)["of"] == "the successor"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000002\n"


def test_no_checkpoint_is_removed_without_the_lease(tmp_path):
    on_threads(RANKS, lambda engine: save(tmp_path, engine, 1))

    def each(engine):
        with pytest.raises(LeaseLostError):
            save(tmp_path, engine, 2, lease, keep_last=1)

    lease = LeaseLostAt(3)
    on_threads(RANKS, each)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert (tmp_path / "checkpoints" / "step-00000001").exists()


@pytest.mark.parametrize(
    ("failing_rank", "error", "retry"),
    [
        (0, OSError(errno.ENOSPC, "No space left on device"), True),
        (1, OSError(errno.EIO, "Input/output error"), True),
        (1, ValueError("a bug"), False),
    ],
)
def test_all_ranks_know_whether_a_save_may_succeed_later(tmp_path, monkeypatch, failing_rank, error, retry):
    write = checkpointer.write_fragments

    def fail(snapshot, folder):
        if snapshot.rank == failing_rank:
            raise error
        return write(snapshot, folder)

    monkeypatch.setattr(checkpointer, "write_fragments", fail)

    def each(engine):
        with pytest.raises(CheckpointError, match=f"rank {failing_rank}: {type(error).__name__}: ") as failure:
            save(tmp_path, engine, 1)
        return failure.value.retry

    assert on_threads(RANKS, each) == [retry] * RANKS


def test_a_checkpoint_larger_than_the_disk_may_succeed_later(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpointer.shutil, "disk_usage", lambda folder: type("usage", (), {"free": 5}))

    def each(engine):
        with pytest.raises(CheckpointError, match="has 5 bytes free") as failure:
            save(tmp_path, engine, 1)
        return failure.value.retry

    assert on_threads(RANKS, each) == [True] * RANKS


def test_a_full_disk_is_an_error_of_the_disk_also_where_safetensors_writes(small_disk):
    small_disk.fill()
    with pytest.raises(OSError, match=f"No space left on device: '{small_disk.folder}/") as failure:
        weights.save_weights([("weight", torch.zeros(100_000))], small_disk.folder)
    assert may_succeed_later(failure.value)


def test_what_safetensors_says_of_tensors_stays_its_error(tmp_path):
    with pytest.raises(weights.SafetensorError, match="invalid"), weights.disk_errors(tmp_path):
        raise weights.SafetensorError("invalid header")
