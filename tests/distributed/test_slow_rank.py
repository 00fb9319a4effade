"""A rank that takes longer than the others is told from one that waits for it, and named."""

import time

import pytest
import torch

from dcscale.observe.events import event_path, read_events
from dcscale.parallel import discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config
from dcscale.train import build_trainer
from dcscale.train.hooks.stragglers import Stragglers

pytestmark = pytest.mark.distributed


class Lines:
    """A console that keeps its lines."""

    def __init__(self):
        self.lines = []

    def line(self, text=""):
        self.lines.append(text)


def _train_with_a_slow_rank(config):
    environment, console = discover(), Lines()
    start_distributed(environment, config.parallel.start_timeout_minutes)
    trainer = build_trainer(config, environment, console)
    seconds = 0.3 if environment.rank == 1 else 0.06
    trainer.engine.module.register_forward_pre_hook(lambda *_: time.sleep(seconds))
    trainer.hooks = [Stragglers(interval=15, block=3) if hook.name == "stragglers" else hook for hook in trainer.hooks]
    trainer.fit()
    trainer.close()
    gathered = trainer.engine.gather_on_rank0(torch.tensor([environment.rank, 7]))
    return [line for line in console.lines if "slower" in line], gathered and [tensor.tolist() for tensor in gathered]


def test_a_slow_rank_is_named_and_the_other_one_waits(shards, tmp_path):
    config = tiny_config(
        tmp_path / "run",
        shards,
        *("train.steps=15", "train.micro_batch_size=4", "validation.interval=0", "log.compose_interval=0"),
    )
    (warnings, gathered), (_, nothing) = run_distributed(_train_with_a_slow_rank, 2, config)
    assert gathered == [[0, 7], [1, 7]]
    assert nothing is None
    (warning,) = warnings
    assert warning.startswith("warning    rank 1 (")
    assert warning.endswith(" s longer in forward")
    start, straggler, waiting, checkpoint = read_events(event_path(tmp_path / "run", 0))
    assert (start["event"], start["step"], start["checkpoint"], start["world_size"]) == ("start", 0, None, 2)
    assert (straggler["event"], straggler["rank"], straggler["phase"]) == ("straggler", 1, "forward")
    assert checkpoint["event"] == "checkpoint"
    assert checkpoint["checkpoint"].endswith("step-00000015")
    start, slow = read_events(event_path(tmp_path / "run", 1))
    assert waiting["forward"] > 0.06
    assert slow["forward"] > 0.3
    assert waiting["waiting"] > slow["waiting"] + 0.1
    for steps in (waiting, slow):
        parts = sum(steps[name] for name in ("data", "forward", "backward", "update", "waiting"))
        assert 0.9 * steps["seconds"] < parts <= steps["seconds"] + 1e-5
