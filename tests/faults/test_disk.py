"""A full or read-only disk: the error names it, existing checkpoints stay, the run stops or continues as configured."""

import contextlib
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dcscale.checkpoint import CheckpointError, checkpointer, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import corrupt_reason
from dcscale.observe import Console, read_metrics
from dcscale.parallel import Environment, discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config
from dcscale.train import build_trainer
from dcscale.train.hooks import Hook
from dcscale.train.preflight import preflight

pytestmark = pytest.mark.distributed


@contextlib.contextmanager
def small_disk_at(folder, size):
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no permission to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def run(tmp_path):
    """A run folder with its checkpoints on a disk of 1 MiB, which has room for one checkpoint, not for two."""
    with small_disk_at(tmp_path / "run" / "checkpoints", "1m"):
        yield tmp_path / "run"


@pytest.fixture
def run_on_a_small_disk(tmp_path):
    """A run folder on a disk of 4 MiB."""
    with small_disk_at(tmp_path / "run", "4m"):
        yield tmp_path / "run"


class ChangeDisk(Hook):
    """Changes the disk after a step."""

    name = "change_disk"

    def __init__(self, call, step):
        self._call, self._step = call, step

    def after_step(self, trainer):
        if trainer.state.step == self._step:
            self._call(trainer.run / "checkpoints")


def remount(disk, options):
    subprocess.run(["mount", "-o", f"remount,{options}", disk], check=True)


def enlarge(disk):
    remount(disk, "size=8m")


def fill(checkpoints):
    with open(checkpoints.parent / "filling", "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 10))


def make_room(checkpoints):
    (checkpoints.parent / "filling").unlink()


def make_read_only(disk):
    remount(disk, "ro")


def make_writable(disk):
    remount(disk, "rw")


def _train(config, changes, hide_disk_usage):
    """Returns the error of training, the last finished step and the printed warnings."""
    if hide_disk_usage:
        checkpointer.shutil.disk_usage = lambda folder: namedtuple("usage", "free total")(1 << 40, 1 << 40)
    environment = discover()
    start_distributed(environment, 1)
    trainer = build_trainer(config, environment, Console(enabled=False))
    trainer.hooks = [*(ChangeDisk(call, step) for call, step in changes), *trainer.hooks]
    warnings = []
    trainer._reporter.warn = warnings.append
    failure = ""
    try:
        trainer.fit()
    except CheckpointError as error:
        failure = str(error)
    trainer.close()
    return failure, trainer.state.step, warnings


def train(run, shards, *overrides, changes=(), hide_disk_usage=False):
    config = tiny_config(run, shards, "checkpoint.interval=2", "validation.interval=0", *overrides)
    return run_distributed(_train, 1, config, changes, hide_disk_usage)[0]


@pytest.mark.parametrize("makes_room_after", [6, 8])
def test_a_disk_that_is_full_while_logging_stops_nothing_and_no_record_is_lost(
    run_on_a_small_disk, shards, makes_room_after
):
    run = run_on_a_small_disk
    changes = [(fill, 2), (make_room, makes_room_after)]
    assert train(run, shards, "checkpoint.interval=0", changes=changes) == ("", 8, [])
    assert [record["step"] for record in read_metrics(run / "metrics.jsonl")] == list(range(1, 9))
    curves = EventAccumulator(str(run / "tensorboard"))
    curves.Reload()
    assert [event.step for event in curves.Scalars("loss/train")] == list(range(1, 9))
    assert corrupt_reason(find_checkpoint(run)) is None
    assert not (run / "lease.json").exists()


FULL = {False: "bytes free, but the checkpoint takes", True: "No space left on device"}


@pytest.mark.parametrize("hide_disk_usage", FULL)
def test_a_full_disk_stops_the_run(run, shards, hide_disk_usage):
    failure, step, warnings = train(run, shards, hide_disk_usage=hide_disk_usage)
    assert f"checkpoint {run}/checkpoints/step-00000004 was not written: rank 0: " in failure
    assert FULL[hide_disk_usage] in failure
    assert 4 <= step < 8
    assert warnings == []
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000002"]
    assert corrupt_reason(find_checkpoint(run)) is None


@pytest.mark.parametrize("hide_disk_usage", FULL)
def test_a_full_disk_is_reported_and_training_continues_until_there_is_room(run, shards, hide_disk_usage):
    failure, step, warnings = train(
        run,
        shards,
        "checkpoint.on_error=warn",
        "checkpoint.background=false",
        changes=[(enlarge, 7)],
        hide_disk_usage=hide_disk_usage,
    )
    assert (failure, step, len(warnings)) == ("", 8, 2)
    for warning, name in zip(warnings, ("step-00000004", "step-00000006")):
        assert f"{name} was not written: rank 0: " in warning
        assert FULL[hide_disk_usage] in warning
        assert warning.endswith("Training continues (checkpoint.on_error=warn)")
    assert [p.name for p in checkpoints_of(run)] == ["step-00000002", "step-00000008"]
    failures = {r["step"]: r["checkpoint_failures"] for r in read_metrics(run / "metrics.jsonl")}
    assert failures == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 1, 7: 2, 8: 2}


def test_the_last_checkpoint_must_be_written_whatever_the_policy(run, shards):
    failure, step, warnings = train(run, shards, "checkpoint.on_error=warn")
    assert "step-00000008 was not written" in failure
    assert (step, len(warnings)) == (8, 2)


@pytest.mark.parametrize("policy", ["fail", "warn"])
def test_a_read_only_folder(run, shards, policy):
    changes = [(enlarge, 1), (make_read_only, 4), (make_writable, 7)]
    failure, step, warnings = train(
        run, shards, f"checkpoint.on_error={policy}", "checkpoint.background=false", changes=changes
    )
    message = "step-00000004 was not written: rank 0: OSError: [Errno 30] Read-only file system: "
    if policy == "fail":
        assert message in failure
        assert step == 4
    else:
        assert failure == ""
        assert message in warnings[0]
        assert (step, len(warnings)) == (8, 2)
    names = ["step-00000002"] if policy == "fail" else ["step-00000002", "step-00000008"]
    assert [p.name for p in checkpoints_of(run)] == names
    assert (run / "checkpoints" / "latest").read_text() == names[-1] + "\n"


def test_a_folder_that_is_read_only_from_the_start_keeps_the_run_from_starting(run, shards):
    make_read_only(run / "checkpoints")
    found = preflight(tiny_config(run, shards), Environment(0, 0, 1, 1, torch.device("cpu")))
    problem = f"run.folder {run} cannot be used: no permission to write to {run}/checkpoints; use another folder"
    assert found.reasons == [problem]
    assert shutil.disk_usage(run / "checkpoints").total == 1 << 20
    assert os.listdir(run / "checkpoints") == []
