"""The run folder belongs to one start at a time: a second one is refused, and one that has lost it stops."""

import json
import threading
from dataclasses import asdict
from pathlib import Path

import pytest

from dcscale.lease import LEASE, Holder, LeaseHeldError, LeaseLostError
from dcscale.observe import Console, read_metrics
from dcscale.parallel import discover, set_timeouts, start_distributed
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import tiny_config
from dcscale.train import build_trainer
from dcscale.train.hooks import Hook
from dcscale.train.preflight import PreflightError

pytestmark = pytest.mark.distributed

OTHER = asdict(Holder("n7", 4711, "b", "pid:[1]", 1, "17", 0, "srun", "2026-11-26 12:00:00 UTC")) | {"token": "another"}


class TakeOver(Hook):
    """Another start takes over the run folder after a step."""

    name = "take_over"

    def __init__(self, step):
        self._step = step

    def after_step(self, trainer):
        if trainer.state.step == self._step and trainer.environment.is_main:
            (trainer.run / "new").write_text(json.dumps(OTHER))
            (trainer.run / "new").rename(trainer.run / LEASE)


def content(folder):
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != LEASE}


def _refused(config):
    """What a start says while another one renews its lease."""
    environment = discover()
    start_distributed(environment, config.parallel.start_timeout_minutes)
    run, ended = Path(config.run.folder), threading.Event()
    run.mkdir(exist_ok=True)

    def renew():
        renewals = 0
        while not ended.wait(0.2):
            renewals += 1
            (run / "new").write_text(json.dumps({**OTHER, "renewals": renewals}))
            (run / "new").rename(run / LEASE)

    if environment.is_main:
        (run / LEASE).write_text(json.dumps(OTHER))
        threading.Thread(target=renew, daemon=True).start()
    set_timeouts(0.1)  # rank 0 may wait longer for the lease than collectives may take
    with pytest.raises(LeaseHeldError) as refused:
        build_trainer(config, environment, Console(enabled=False))
    ended.set()
    return str(refused.value)


def _lost(config):
    """What a start says that has lost the run folder."""
    environment = discover()
    trainer = build_trainer(config, environment, Console(enabled=False))
    trainer.hooks = [TakeOver(5), *trainer.hooks]
    with pytest.raises(LeaseLostError) as lost:
        trainer.fit()
    trainer.close()
    return str(lost.value)


def _unfit(config):
    with pytest.raises(PreflightError):
        build_trainer(config, discover(), Console(enabled=False))


def _starts(refused, lost, unfit):
    answers = _refused(refused), _lost(lost)
    _unfit(unfit)
    return answers


def test_one_start_at_a_time(tmp_path, shards):
    overrides = (
        "parallel.zero_stage=2",
        "checkpoint.interval=3",
        "checkpoint.background=false",
        "validation.interval=0",
    )
    refused, lost = (tiny_config(tmp_path / name, shards, *overrides) for name in ("refused", "lost"))
    unfit = tiny_config(tmp_path / "unfit" / "run", tmp_path / "no-data")
    (before, after), (again, after_again) = run_distributed(_starts, 2, refused, lost, unfit)

    who = "process 4711 on n7 (job 17, srun), since 2026-11-26 12:00:00 UTC"
    way_out = "stop that process, or wait until it ends; another run needs another run.folder"
    assert before == again == f"{tmp_path / 'refused'} is in use by {who}; {way_out}"
    assert content(tmp_path / "refused") == {}

    assert after == after_again
    assert after.startswith(f"{tmp_path / 'lost'} was taken over by {who}: ")
    checkpoints = {path.name for path in (tmp_path / "lost" / "checkpoints").iterdir()}
    assert checkpoints == {"latest", "step-00000003"}
    assert json.loads((tmp_path / "lost" / LEASE).read_text()) == OTHER
    assert [record["step"] for record in read_metrics(tmp_path / "lost" / "metrics.jsonl")] == list(range(1, 7))

    assert not (tmp_path / "unfit").exists()
