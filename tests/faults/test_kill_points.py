"""SIGKILL before every disk operation of a save (open, fsync, rename, removal) and in the middle of each file.

After every kill there is a complete checkpoint, and the next save succeeds and cleans up.
"""

import os
import shutil
import signal
import sys
from itertools import count

import torch

from dcscale.checkpoint import Checkpointer, find_checkpoint, training_state, weights
from dcscale.checkpoint.layout import corrupt_reason, step_of
from dcscale.config import CheckpointConfig
from dcscale.testing.distributed import on_threads, run_distributed

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


def save(run, step):
    """Two ranks save a checkpoint, which removes the previous one."""

    def each(engine):
        checkpointer = Checkpointer(engine, run, CheckpointConfig(keep_last=1))
        engine.step = step
        checkpointer.save(step, {"format": 1, "step": step}, {"config.yaml": b"a: 1\n"})
        checkpointer.wait()
        checkpointer.close()

    on_threads(2, each)


def save_and_die(run, step, last_operation):
    """Saves in a process that is killed before the operation with this number; returns whether it was killed."""
    process = os.fork()
    if process == 0:
        torch.set_num_threads(1)  # recreates torch's thread pool after the fork, before two threads use it
        done = count(1)

        def operate():
            if next(done) == last_operation:
                os.kill(os.getpid(), signal.SIGKILL)

        def audit(event, arguments):
            if event in CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
                operate()

        fsync, save_file = os.fsync, training_state.save_file

        def fsync_or_die(descriptor):
            operate()
            fsync(descriptor)

        def save_file_or_die(tensors, path, **more):
            save_file(tensors, path, **more)
            content = path.read_bytes()
            path.write_bytes(content[: len(content) // 2])  # killed in the next operation, the file is half written
            operate()
            path.write_bytes(content)

        sys.addaudithook(audit)
        os.fsync, training_state.save_file, weights.save_file = fsync_or_die, save_file_or_die, save_file_or_die
        save(run, step)
        os._exit(0)
    status = os.waitpid(process, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def _die_everywhere(folder):
    """For each operation: the step of the newest complete checkpoint after a kill before this operation."""
    run, start = folder / "run", folder / "start"
    save(start, 1)
    found = []
    operations = count(1)
    shutil.copytree(start, run)
    while save_and_die(run, 2, operation := next(operations)):
        newest = find_checkpoint(run)
        latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
        assert corrupt_reason(newest) is None, operation
        assert corrupt_reason(latest) is None, operation
        found.append(step_of(newest))
        save(run, 3)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["latest", "step-00000003"], operation
        assert corrupt_reason(run / "checkpoints" / "step-00000003") is None
        shutil.rmtree(run)
        shutil.copytree(start, run)
    return found


def test_a_kill_at_every_operation_of_a_save(tmp_path):
    (found,) = run_distributed(_die_everywhere, 1, tmp_path)
    # The old checkpoint is the newest until the folder is renamed. Then latest is updated and the old one removed.
    assert found == sorted(found)
    assert found.count(1) > 40
    assert found.count(2) > 10
