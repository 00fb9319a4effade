"""Three ways to launch a run: same losses, understandable errors, a signal and a resume."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dcscale.observe import read_metrics
from dcscale.parallel import free_port
from dcscale.testing.runs import tiny_settings

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

pytestmark = pytest.mark.distributed


def launcher(name):
    return {
        "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": [
            *(str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())),
            *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"),
        ],
        "python": [sys.executable],
    }[name]


def environment():
    # Without OMP_NUM_THREADS every launcher shares the cores alike, so that sums have the same order.
    removed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "OMP_NUM_THREADS")
    keep = {k: v for k, v in os.environ.items() if k not in removed}
    keep["TORCHDYNAMO_DISABLE"] = "1"  # spares each rank 2 s: DeepSpeed compiles Muon, which no run uses, when imported
    return {**keep, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def start(name, *arguments):
    return subprocess.Popen(
        [*launcher(name), str(ROOT / "launch" / "train.py"), *arguments],
        env=environment(),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(name, *arguments):
    process = start(name, *arguments)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def settings(tmp_path, shards, *more):
    """A YAML file and overrides, as a user would give them."""
    values = {text.partition("=")[0]: text for text in [*tiny_settings(tmp_path, shards), "samples.interval=0", *more]}
    return ["configs/quickstart.yaml", *values.values()]


def test_every_launcher_gives_the_same_losses(tmp_path, shards):
    losses = {}
    for name in ("deepspeed", "torchrun", "python"):
        code, out, err = run(name, *settings(tmp_path / name, shards, "validation.interval=9"))
        assert code == 0, err
        assert "DCFormer, 41,216 parameters" in out
        assert out.count("warning    validation.interval = 9: is more than train.steps = 8") == 1  # from rank 0 only
        ranks, count = (1, "4 micro-batches") if name == "python" else (2, "2 micro-batches")
        assert re.search(rf"^ranks      {ranks} x .*\nbatch .*; on each rank {count} of 2$", out, re.MULTILINE)
        hosts = re.escape(socket.gethostname())
        assert re.search(rf"^launch     {name}(, job \S+)?: {ranks} ranks? on {hosts}$", out, re.MULTILINE)
        assert "ended      all training steps are done" in out
        assert re.search(r"^trained    8 steps on 2,0[0-4]\d tokens in \d+ s$", out, re.MULTILINE)
        records = read_metrics(tmp_path / name / "metrics.jsonl")
        losses[name] = [(r["loss"], r["grad_norm"]) for r in records]
        world_size = json.loads((tmp_path / name / "summary.json").read_text())["world_size"]
        assert world_size == (1 if name == "python" else 2)
    for step in range(8):
        assert losses["deepspeed"][step] == losses["torchrun"][step]
        assert losses["python"][step] == pytest.approx(losses["deepspeed"][step], rel=1e-5)


def test_bad_settings_are_listed_together_without_a_traceback(tmp_path, shards):
    code, out, err = run("python", *settings(tmp_path / "run", shards, "model.heads=5", "train.global_batch_size=0"))
    assert code == 2
    assert "model.heads" in err
    assert "train.global_batch_size" in err
    assert "Traceback" not in out + err
    assert not (tmp_path / "run").exists()


def test_missing_shards_stop_all_ranks_with_one_message(tmp_path, shards):
    code, _, err = run("torchrun", *settings(tmp_path / "run", shards, f"data.train={tmp_path / 'nothing'}"))
    assert code != 0
    (message,) = re.findall(r"^error: .*", err, re.MULTILINE)
    assert "nothing" in message
    assert err.count("traceback : error: ") == 2, "torchrun's summary has it too, for each rank"
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_too_small_for_the_data(tmp_path, shards):
    code, _, err = run("python", *settings(tmp_path / "run", shards, "model.vocab_size=256"))
    assert code == 2
    assert "set model.vocab_size to at least 257" in err


def test_no_settings_and_help():
    assert run("python")[0] == 2
    code, out, _ = run("python", "--help")
    assert code == 0
    assert "deepspeed launch/train.py CONFIG.yaml" in out


def test_a_lost_deepspeed_launcher_does_not_leave_workers_behind(tmp_path, shards):
    """`deepspeed` dies of SIGTERM immediately without stopping its workers: they must notice it themselves."""
    arguments = settings(tmp_path / "run", shards, "train.steps=100000", "checkpoint.interval=0")
    process = start("deepspeed", *arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    summary = tmp_path / "run" / "summary.json"
    wait_until(summary.exists)
    assert not json.loads(summary.read_text())["completed"]
    mine = str(tmp_path / "run").encode()
    wait_until(lambda: not any(mine in command for command in commands()))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").glob("step-*")]


def commands():
    """The command lines of all processes."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield path.read_bytes()
        except OSError:  # the process has ended
            continue


def wait_until(condition, seconds=200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


@pytest.mark.parametrize(("name", "number"), [("torchrun", signal.SIGUSR1), ("python", signal.SIGTERM)])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_resumes(tmp_path, shards, name, number):
    endless = ["train.steps=100000", "schedule.warmup_steps=2", "checkpoint.interval=0"]
    arguments = settings(tmp_path / "run", shards, *endless)
    process = start(name, *arguments)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 2)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    # torchrun exits with 1 for any child that failed.
    assert process.returncode == (75 if name == "python" else 1), err
    assert "a stop signal was received" in out
    stopped = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert not stopped["completed"]
    assert json.loads((tmp_path / "run" / "ending.json").read_text())["code"] == 75
    steps = stopped["steps"]
    assert (tmp_path / "run" / "checkpoints" / f"step-{steps:08d}" / "COMPLETE").exists()
    if name == "torchrun":  # resuming does not depend on the launcher
        return
    code, out, err = run(name, *arguments, f"train.stop_after={steps + 2}")
    assert code == 0, err
    assert f"resuming   from {tmp_path}/run/checkpoints/step-{steps:08d}" in out
    numbers = [r["step"] for r in read_metrics(metrics)]
    assert numbers == list(range(1, steps + 3))
