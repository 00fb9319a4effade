"""SIGKILL to all ranks of a run at random moments around its saves: each next start resumes exactly.

``DCSCALE_KILLS=300`` kills more often; ``DCSCALE_KILL_SEED`` chooses other moments.
"""

import os
import random
import signal
import time

import pytest

from dcscale.checkpoint import checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import corrupt_reason
from dcscale.observe import read_metrics
from dcscale.testing.distributed import run_distributed, start_ranks
from dcscale.testing.runs import tiny_config, train_here

KILLS = int(os.environ.get("DCSCALE_KILLS", "8"))
SEED = int(os.environ.get("DCSCALE_KILL_SEED", "0"))
SECONDS_AROUND_A_SAVE = 0.3

pytestmark = pytest.mark.distributed


def settings(run, shards, *more):
    # A checkpoint after every step, so that at any moment one is being written or waited for, or an old one removed.
    every_step = ["checkpoint.interval=1", "checkpoint.keep_last=2", "checkpoint.keep_every=7"]
    quick = ["validation.interval=0", "log.compose_interval=0", "schedule.kind=constant", "train.steps=100000"]
    return tiny_config(run, shards, *every_step, *quick, *more)


def _train(config):
    return str(train_here(config)[0].latest_checkpoint)


def killed(run, config, delay, chance):
    """Starts two ranks, kills them ``delay`` seconds after a checkpoint is begun; returns the state of the folder."""
    root = run / "checkpoints"
    before = {p.name for p in root.glob("*")} if root.exists() else set()
    processes, _ = start_ranks(_train, 2, config)
    deadline = time.monotonic() + 120
    while not {p.name for p in root.glob("*")} - before - {"latest"}:
        assert time.monotonic() < deadline, "no checkpoint was started"
        assert all(process.is_alive() for process in processes), "a rank has died without a kill"
        time.sleep(0.002)
    time.sleep(delay)
    for process in chance.sample(processes, 2):
        os.kill(process.pid, signal.SIGKILL)
    for process in processes:
        process.join()
    return "unfinished" if list(root.glob(".unfinished-*")) else "between"


def test_random_kills_around_saves_leave_the_losses_of_a_run_that_was_never_killed(tmp_path, shards):
    run, chance = tmp_path / "killed", random.Random(SEED)
    # Spread over the time of a save, so that also a few kills meet an unfinished checkpoint.
    delays = [(number + chance.random()) / KILLS * SECONDS_AROUND_A_SAVE for number in range(KILLS)]
    chance.shuffle(delays)
    # On a busy machine a kill may come before a save has ever been completed.
    run_distributed(_train, 2, settings(run, shards, "train.stop_after=1"))
    moments = [killed(run, settings(run, shards), delay, chance) for delay in delays]
    assert "unfinished" in moments, moments

    # The newest checkpoint is complete, and the last start resumes from it.
    newest = checkpoints_of(run)[-1]
    assert corrupt_reason(newest) is None
    last = int(newest.name.removeprefix("step-")) + 3
    latest = (run / "checkpoints" / "latest").read_text().strip()
    assert corrupt_reason(run / "checkpoints" / latest) is None
    stop = f"train.stop_after={last}"
    run_distributed(_train, 2, settings(run, shards, stop))
    run_distributed(_train, 2, settings(tmp_path / "whole", shards, stop))

    def exact(folder):
        return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl")]

    assert exact(run) == exact(tmp_path / "whole")
    assert [step for step, *_ in exact(run)] == list(range(1, last + 1))
    names = [f"step-{step:08d}" for step in [*range(7, last - 1, 7), last - 1, last]]
    weights = []
    for folder in (run, tmp_path / "whole"):
        assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["latest", *names]
        weights.append((find_checkpoint(folder) / "weights" / "model-00001.safetensors").read_bytes())
    assert weights[0] == weights[1]
    print(f"{KILLS} kills up to step {last}: {moments.count('unfinished')} of them while a checkpoint was unfinished")
