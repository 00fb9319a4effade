"""Output and commands of launch/quickstart.sh, in a copy with fake installation, Python and launchers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = [*(ROOT / "launch").glob("*.sh"), ROOT / "tests" / "run.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_valid_bash(script):
    subprocess.run(["bash", "-n", script], check=True)


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def start(folder, *arguments, **variables):
    keep = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    return subprocess.Popen(
        ["bash", str(folder / "launch" / "quickstart.sh"), *arguments],
        env={**keep, "PYTHONPATH": str(ROOT), **variables},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def quickstart(folder, *arguments, **variables):
    process = start(folder, *arguments, **variables)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_is_shown_and_nothing_is_created(copy, flag):
    code, out, err = quickstart(copy, flag)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: bash launch/quickstart.sh")
    assert [path.name for path in copy.iterdir()] == ["launch"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nwe"], "unknown option '--nwe'; see bash launch/quickstart.sh --help"),
        (["quickstart.yaml"], "unknown option 'quickstart.yaml'"),
        (["--name"], "--name needs a value"),
        (["--new", "--processes"], "--processes needs a value"),
        (["--name", "a/b"], "--name 'a/b': use letters"),
        (["--name", ""], "--name ''"),
        (["--processes", "0"], "--processes '0' is not a number above 0"),
        (["--processes", "two"], "--processes 'two' is not"),
        (["run.name=x"], "'run.name=x': name the run with --name x"),
    ],
)
def test_invalid_arguments_are_rejected_before_anything_is_created(copy, arguments, message):
    code, out, err = quickstart(copy, *arguments)
    assert (code, out) == (2, "")
    assert f"error: {message}" in err
    assert [path.name for path in copy.iterdir()] == ["launch"]


@pytest.fixture
def installed(copy):
    """The copy with data, and with launchers that only print their command lines."""
    (copy / "launch" / "install.sh").write_text("")
    for split in ("train", "validation"):
        manifest = copy / "runs" / "data" / "python-stdlib" / split / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    # GPUS is the number of GPUs that torch finds.
    program(copy, "python", f'case "$*" in *torch.cuda*) echo "$GPUS" ;; *) exec "{sys.executable}" "$@" ;; esac')
    for name in ("deepspeed", "torchrun"):
        program(copy, name, f'echo "{name} $*, visible: ${{CUDA_VISIBLE_DEVICES-unset}}"')
    return copy


def program(folder, name, script):
    path = folder / ".venv" / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


TRAIN = "launch/train.py configs/quickstart.yaml run.name=quickstart"


@pytest.mark.parametrize(
    ("gpus", "visible", "arguments", "command"),
    [
        (0, None, [], f"deepspeed --quiet --num_accelerators 2 {TRAIN}, visible: unset"),
        (0, "", [], f"deepspeed --quiet --num_accelerators 2 {TRAIN}, visible: "),
        (0, None, ["--processes", "3"], f"--num_accelerators 3 {TRAIN} train.global_batch_size=12,"),
        (4, None, ["a.b=1"], f"--num_accelerators 4 {TRAIN} train.global_batch_size=16 train.precision=bf16 a.b=1,"),
        (4, None, ["train.precision=fp32"], f"{TRAIN} train.global_batch_size=16 train.precision=fp32,"),
        (4, None, ["--processes", "2"], f"--num_accelerators 2 {TRAIN} train.precision=bf16,"),
        (1, "3", [], f"deepspeed --quiet --include localhost:3 {TRAIN} train.precision=bf16, visible: unset"),
        (2, "2, 5", [], f"--include localhost:2,5 {TRAIN}"),
        (2, "2,5", ["--processes", "1"], f"--include localhost:2 {TRAIN}"),
        (1, "GPU-a", [], f"torchrun --standalone --nproc-per-node 1 {TRAIN} train.precision=bf16, visible: GPU-a"),
    ],
)
def test_the_run_gets_the_processes_and_gpus_it_may_use(installed, gpus, visible, arguments, command):
    variables = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    code, out, err = quickstart(installed, *arguments, GPUS=str(gpus), **variables)
    assert (code, err) == (0, "")
    assert command in out
    assert "tensorboard --logdir runs" in out


def test_more_processes_than_gpus(installed):
    code, _, err = quickstart(installed, "--processes", "3", GPUS="2")
    assert code == 2
    assert "error: --processes 3, but there are 2 GPUs" in err


@pytest.mark.parametrize("arguments", [[], ["train.steps=7", "data.train=a b"]])
def test_a_complete_run_prints_which_settings_were_ignored(installed, arguments):
    run = installed / "runs" / "baseline"
    run.mkdir()
    summary = {"completed": True, "steps": 5, "tokens": 5, "train_seconds": 5.0, "last_checkpoint": "step-00000005"}
    nothing = dict.fromkeys(("first_loss", "validation_loss", "sample"))
    (run / "summary.json").write_text(json.dumps({**summary, **nothing, "skipped_shards": 0}))
    code, out, _ = quickstart(installed, "--name", "baseline", *arguments, GPUS="0")
    assert code == 0
    assert "runs/baseline is complete:" in out
    assert "deepspeed" not in out
    assert ("Ignored, because the run is complete: train.steps=7 data.train=a b\n" in out) == bool(arguments)
    again = " ".join(["bash launch/quickstart.sh --name baseline --new", *[a.replace(" ", "\\ ") for a in arguments]])
    assert f"Start another run with: {again}\n" in out


def test_a_signal_reaches_the_run_and_the_output_names_the_checkpoint(installed):
    # Like DeepSpeed: a command that waits for a launcher, and only the launcher handles signals.
    worker = installed / "worker.py"
    worker.write_text(
        "import pathlib, signal, sys, time\n"
        "checkpoints = pathlib.Path('runs/quickstart/checkpoints')\n"
        "def stop(number, frame):\n"
        "    time.sleep(1)\n"
        "    (checkpoints / 'latest').write_text('step-00000005')\n"
        "    sys.exit(75)\n"
        "signal.signal(signal.SIGINT, stop)\n"
        "checkpoints.mkdir(parents=True)\n"
        "time.sleep(100)\n"
    )
    program(installed, "deepspeed", f'"{sys.executable}" "{worker}"; exit $?')
    process = start(installed, GPUS="0")
    deadline = time.monotonic() + 60
    while not (installed / "runs" / "quickstart" / "checkpoints").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (75, "")
    assert out.endswith("The same command resumes from runs/quickstart/checkpoints/step-00000005.\n")
