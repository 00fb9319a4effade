"""Time limits in minutes, by the clock of rank 0 only."""

import time

import pytest

from dcscale.checkpoint.layout import checkpoints_of
from dcscale.observe import Console
from dcscale.parallel import discover, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config
from dcscale.train import StopReason, build_trainer

pytestmark = pytest.mark.distributed


def _train(config):
    environment = discover()
    start_distributed(environment, config.parallel.start_timeout_minutes)
    trainer = build_trainer(config, environment, Console(enabled=False))
    start = time.monotonic()
    # 61 s a step on rank 0. The other one would do everything at once.
    trainer.seconds_now = lambda: start + (61 * trainer.state.step if environment.is_main else 1e9)
    stop_reason = trainer.fit()
    trainer.close()
    together = trainer.engine.barrier()
    alone = environment.is_main and trainer.engine.barrier(0.2)
    return stop_reason, trainer.state.step, together, alone


def test_a_start_stops_and_saves_by_the_clock(shards, tmp_path):
    limits = ["train.stop_after_minutes=5", "checkpoint.interval_minutes=2", "checkpoint.background=false"]
    config = tiny_config(tmp_path / "run", shards, "validation.interval=0", *limits)
    assert run_distributed(_train, 2, config) == [(StopReason.TIME_LIMIT, 5, True, False)] * 2
    # The interval is over after two steps, so the step after them is saved; the last one since the run stops.
    assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["step-00000003", "step-00000005"]
