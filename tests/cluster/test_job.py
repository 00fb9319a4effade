"""The job script on a SLURM of two nodes: each way to end, and what follows.

All jobs run at the same time. Only the one that is to be preempted is in the partition where that can happen.
"""

import json
import shlex
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from jobs import Submitted, curve
from nodes import ROOT, merge

from dcscale.cluster.restarts import report_bad_node
from dcscale.config import load_config
from dcscale.testing.runs import tiny_settings

pytestmark = pytest.mark.distributed

STEPS = 12
SAFE = "--partition=urgent"
AWKWARD = "a b 'c' \"d\" {e,f} $HOME $(g) `h` & ; * \\ #i"


def pace(seconds, **more):
    return {"kind": "pace", "seconds": seconds, **more}


def last(run):
    """The last decision about the job, and how often it was started again."""
    content = json.loads((run / "restarts.json").read_text())
    return content["last"]["action"], content["last"]["code"], content["restarts"]


class Scenarios:
    """Each submits a job, does something to it, and returns it when it has ended for good, with how."""

    def __init__(self, cluster, shards, folder):
        self.cluster, self.shards, self.folder = cluster, shards, folder

    def submit(self, name, *options, more=(), **rest):
        steps = [f"train.steps={STEPS}", "checkpoint.interval=2", "log.compose_interval=0", "validation.interval=0"]
        settings = merge([*tiny_settings(self.folder / name, self.shards), *steps, *more])
        without = [setting for setting in settings if not setting.startswith("run.folder=")]
        return Submitted(self.cluster, self.folder / name, without, *options, **rest)

    def limits(self):
        # USR1 comes up to 30 s after the start, as SLURM looks at time limits so often: about 4, then 6 steps later.
        job = self.submit("limits", SAFE, "--time=1", faults=[pace(8, restart=0), pace(5, restart=1)])
        return job, job.end()

    def preempted(self):
        job = self.submit("preempted", faults=[pace(0.4, restart=0)])
        job.reach(3)
        size = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=7"]  # one CPU of each node is for `limits`
        self.cluster.slurm("sbatch", SAFE, *size, "--output=/dev/null", "--wait", "--wrap", "true")
        return job

    def finished(self):
        job = self.submit("finished 'i {n}' $HOME", SAFE, more=[f"samples.prompts={json.dumps([AWKWARD])}"])
        return job, job.end()

    def killed(self):
        sbatch = [SAFE, "--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
        job = self.submit("killed", faults=[pace(0.5, restart=0)], by_hand=sbatch)
        job.reach(4)
        job.signal("--batch", "--signal=TERM")  # the script alone, which outlives it
        job.kill(1)
        return job, job.end()

    def cancelled(self):
        job = self.submit("cancelled", SAFE, faults=[pace(0.5)])
        job.reach(3)
        job.signal()
        return job, job.end()

    def unfit(self):
        job = self.submit("unfit", SAFE, more=[f"data.train={self.shards}/nothing"])
        return job, job.end()

    def excluded(self):
        job = self.submit("excluded", SAFE, "--nodes=1", faults=[pace(0.5, restart=0)])
        job.reach(3)
        node = job.ask("NodeList")
        report_bad_node(job.run, node, "a bad link", {"SLURM_JOB_ID": job.id})
        job.signal("--signal=USR1")
        return job, job.end(), node, job.ask("NodeList")

    def swept(self):
        job = self.submit(
            "swept", SAFE, "--nodes=1", "--sweep=optimizer.weight_decay=0,0.2", faults=[pace(0.5, restart=0)]
        )
        runs = [job.run / "0-weight_decay=0", job.run / "1-weight_decay=0.2"]
        for run in runs:
            job.wait(lambda run=run: (run / "metrics.jsonl").exists(), 90, "a step")
        job.signal("--signal=USR1")  # to both tasks
        return job, runs, [(job.end(task=task), job.restarts(task)) for task in ("_0", "_1")]

    def edited(self):
        root = self.folder / "checkout"
        for name in ("dcscale", "launch"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        job = self.submit("edited", SAFE, "--nodes=1", "--sbatch=--hold", faults=None, root=root)
        for path in (root / "dcscale" / "__init__.py", root / "launch" / "train.py"):
            path.write_text("raise SystemExit('the edited code was run')\n")
        self.cluster.slurm("scontrol", "release", job.id)
        return job, job.end()


@pytest.fixture(scope="module")
def jobs(cluster, shards, tmp_path_factory):
    """What each scenario returns, by name, once it is asked for."""
    scenarios = Scenarios(cluster, shards, tmp_path_factory.mktemp("jobs"))
    with ThreadPoolExecutor(10) as pool:
        limits = pool.submit(scenarios.limits)
        preempted = scenarios.preempted()  # alone, since the preemption takes what it needs from any job
        names = ("edited", "finished", "killed", "cancelled", "unfit", "excluded", "swept")
        futures = {name: pool.submit(getattr(scenarios, name)) for name in names}
        futures["limits"], futures["preempted"] = limits, pool.submit(lambda: (preempted, preempted.end()))
        yield lambda name: futures[name].result()


@pytest.fixture(scope="module")
def uninterrupted(jobs):
    """The curve of a job to which nothing happens."""
    job, end = jobs("finished")
    assert end == "COMPLETED 0:0", job.log
    assert len(curve(job.run)) == STEPS
    return curve(job.run)


def test_submitted_run_finished(jobs, uninterrupted):
    job, _ = jobs("finished")
    assert last(job.run) == ("done", 0, 0)
    assert job.restarts() == 0
    assert f"submitted  job {job.id}" in job.text
    assert f"tail -F {shlex.quote(f'{job.run}/slurm-{job.id}.log')}" in job.text
    arrived = load_config([job.run / "config.yaml"], expand=False).config
    assert (arrived.run.name, arrived.run.folder) == (job.run.name, str(job.run))
    assert arrived.samples.prompts == [AWKWARD]


def test_a_killed_rank_of_a_job_by_hand_is_retried(jobs, uninterrupted):
    job, end = jobs("killed")
    assert end == "COMPLETED 0:0", job.log
    assert job.restarts() == 1
    assert f"(rank 1 on {job.cluster.nodes[1]})" in job.log
    assert curve(job.run) == uninterrupted


def test_scancel_ends_the_job_for_good(jobs, uninterrupted):
    job, end = jobs("cancelled")
    assert end.startswith("CANCELLED"), job.log
    assert job.restarts() == 0
    assert "stopped" in job.log
    assert "as after scancel" in job.log
    saved = json.loads((job.run / "ending.json").read_text())
    assert saved["code"] == 75
    assert curve(job.run) == uninterrupted[: saved["step"]]


def test_a_config_error_is_not_retried(jobs):
    job, end = jobs("unfit")
    assert end == "FAILED 2:0", job.log
    assert job.restarts() == 0
    assert last(job.run) == ("stop", 2, 0)


def test_a_bad_node_is_excluded(jobs):
    job, end, before, after = jobs("excluded")
    assert end == "COMPLETED 0:0", job.log
    assert job.restarts() == 1
    assert {before, after} == set(job.cluster.nodes)
    assert f"node       {before} is excluded: its check failed: a bad link" in job.log
    assert len(curve(job.run)) == STEPS


def test_a_sweep_restarts_each_task_by_itself(jobs):
    job, runs, ends = jobs("swept")
    assert ends == [("COMPLETED 0:0", 1)] * 2, [path.read_text() for path in job.run.glob("slurm-*.log")]
    assert [len(curve(run)) for run in runs] == [STEPS, STEPS]
    assert curve(runs[0]) != curve(runs[1])


def test_edited_code_is_not_run(jobs):
    job, end = jobs("edited")
    assert end == "COMPLETED 0:0", job.log
    assert len(curve(job.run)) == STEPS


def test_preemption(jobs, uninterrupted):
    job, end = jobs("preempted")
    assert end == "COMPLETED 0:0", job.log
    assert job.restarts() >= 1  # other jobs may preempt it, too
    assert curve(job.run) == uninterrupted


def test_the_time_limit_twice(jobs, uninterrupted):
    job, end = jobs("limits")
    assert end == "COMPLETED 0:0", job.log
    restarts = job.restarts()
    assert restarts >= 2  # more on a machine so slow that the signal comes before training
    assert last(job.run) == ("done", 0, restarts)
    assert job.log.count("restart    job") == restarts
    assert curve(job.run) == uninterrupted
