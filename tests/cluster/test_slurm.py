"""A SLURM of two nodes: signals, a second start, ranks that differ, are killed or stopped. Jobs: ``test_job.py``.

Ranks are forked from servers that have made their imports (``warm.py``), but where it is about what comes before.
"""

import json
import signal

import pytest

from dcscale.observe import read_metrics
from dcscale.testing.runs import tiny_settings

pytestmark = pytest.mark.distributed

STEPS = 16


def settings(run, shards, *more):
    return [
        *tiny_settings(run, shards),
        f"train.steps={STEPS}",
        "parallel.zero_stage=2",
        "validation.interval=0",
        "log.compose_interval=0",
        *more,
    ]


def curve(run):
    """Step, loss and gradient norm of each record."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in read_metrics(run / "metrics.jsonl")]


def steps(run):
    """Steps in the metrics file so far."""
    path = run / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def ending(run):
    return json.loads((run / "ending.json").read_text())


def pace(seconds, **more):
    return {"kind": "pace", "seconds": seconds, **more}


@pytest.fixture(scope="module")
def uninterrupted(cluster, shards, tmp_path_factory):
    """The curve of a run to which nothing happens."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    start = cluster.start(settings(run, shards))
    assert start.wait() == 0, start.text
    assert len(curve(run)) == STEPS
    return curve(run)


def finish(cluster, run, shards, *more):
    """The same command again, without what happened to the first start; the curve of the run."""
    start = cluster.start(settings(run, shards, *more))
    assert start.wait() == 0, start.text
    return curve(run)


@pytest.mark.parametrize("kill_on_bad_exit", [True, False])
def test_a_signal_during_the_imports(cluster, shards, tmp_path, kill_on_bad_exit):
    run = tmp_path / "run"
    start = cluster.start(settings(run, shards), cold=True, kill_on_bad_exit=kill_on_bad_exit)
    for rank in (0, 1):
        start.wait_for_handler(rank, signal.SIGUSR1)
    start.signal("USR1")
    assert start.wait(30) == 75, start.text
    assert not run.exists()


@pytest.mark.parametrize("kill_on_bad_exit", [True, False])
def test_a_signal_during_training(cluster, shards, tmp_path, uninterrupted, kill_on_bad_exit):
    run = tmp_path / "run"
    start = cluster.start(settings(run, shards), faults=[pace(0.3)], kill_on_bad_exit=kill_on_bad_exit)
    start.wait_for(lambda: steps(run) >= 3)
    start.signal("USR1")
    assert start.wait(30) == 75, start.text
    stopped = ending(run)
    assert (stopped["code"], stopped["restart_count"]) == (75, None)
    assert 3 <= stopped["step"] < STEPS
    assert not (run / "lease.json").exists()
    assert finish(cluster, run, shards) == uninterrupted


def test_a_second_start_is_refused(cluster, shards, tmp_path):
    run = tmp_path / "run"
    first = cluster.start(settings(run, shards), faults=[pace(2.5)])
    first.wait_for(lambda: steps(run) >= 1)
    unchanged = {path: path.read_bytes() for path in run.glob("*.yaml")}
    # On the other node, as one rank: process ids and start times of another node mean nothing there.
    more = ["train.seed=1"]
    second = cluster.start(settings(run, shards, *more), srun=[f"--nodelist={cluster.nodes[1]}", "--ntasks=1"])
    assert second.wait(60) == 76, second.text
    assert cluster.nodes[0] in second.text
    assert f"job {first.job_id()}" in second.text
    first.signal("USR1")
    assert first.wait(30) == 75, first.text
    assert {path: path.read_bytes() for path in run.glob("*.yaml")} == unchanged
    numbers = [step for step, _, _ in curve(run)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_rank_with_another_config_is_refused(cluster, shards, tmp_path):
    start = cluster.start(settings(tmp_path / "run", shards), rank_settings={1: ["optimizer.learning_rate=0.02"]})
    assert start.wait(60) == 2, start.text
    assert "optimizer.learning_rate" in start.text
    assert cluster.nodes[1] in start.text
    assert not (tmp_path / "run").exists()


def test_a_rank_with_other_code_is_refused(cluster, shards, tmp_path):
    with cluster.other_code(cluster.nodes[1], "dcscale/ops/loss.py"):
        start = cluster.start(settings(tmp_path / "run", shards))
        assert start.wait(60) == 2, start.text
    assert "source" in start.text
    assert cluster.nodes[1] in start.text
    assert not (tmp_path / "run").exists()


def test_a_killed_rank(cluster, shards, tmp_path, uninterrupted):
    run = tmp_path / "run"
    start = cluster.start(settings(run, shards, "checkpoint.interval=4"), faults=[pace(0.3)])
    start.wait_for(lambda: steps(run) >= 6)
    start.kill(1)
    assert start.wait(60) in (76, 137), start.text  # srun returns the highest code
    found = ending(run)
    assert (found["code"], found["rank"], found["host"]) == (76, 1, cluster.nodes[1]), f"{found}\n{start.text}"
    assert finish(cluster, run, shards, "checkpoint.interval=4") == uninterrupted


def test_a_stopped_rank_is_named(cluster, shards, tmp_path, uninterrupted):
    run = tmp_path / "run"
    more = ["checkpoint.interval=4", "parallel.hang_seconds=5"]
    start = cluster.start(settings(run, shards, *more), faults=[pace(0.3)])
    start.wait_for(lambda: steps(run) >= 6)
    start.kill(1, "STOP")
    assert start.wait(60) in (76, 137), start.text
    found = ending(run)
    assert (found["code"], found["rank"], found["host"]) == (76, 1, cluster.nodes[1]), f"{found}\n{start.text}"
    assert list((run / "hangs").glob("*/rank-0.txt"))
    assert finish(cluster, run, shards, "checkpoint.interval=4") == uninterrupted
