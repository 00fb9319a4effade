"""launch/train.py before training: signals and a wrong command line end it with a message, without a traceback."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dcscale.cluster.ending import Ending
from dcscale.parallel import Environment

SCRIPT = Path(__file__).parents[2] / "launch" / "train.py"


class ExitError(BaseException):
    """Stands for the end of the process."""


def leave(code):
    raise ExitError(code)


@pytest.fixture
def train():
    spec = importlib.util.spec_from_file_location("launch_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def catches(pid, number):
    """Whether a process has a handler for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    (mask,) = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith("SigCgt:")]
    return bool(mask & 1 << (number - 1))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 75), (signal.SIGTERM, 75), (signal.SIGHUP, 75)]
)
def test_a_signal_while_the_program_is_loading(tmp_path, number, code):
    command = [sys.executable, str(SCRIPT), "configs/quickstart.yaml", f"run.folder={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    process = subprocess.Popen(
        command, cwd=SCRIPT.parents[1], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while not catches(process.pid, signal.SIGUSR2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert err.startswith(f"stopped    by {number.name} before training; ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train.steps=10"], "--train.steps=10 (command line): a setting has no dashes; write train.steps=10"),
        (["train.steps", "10"], "train.steps (command line): is not of the form key=value; write train.steps=10"),
        (["train.steps=1", "train.steps=2"], 'train.steps = "2" (command line): is given twice'),
        (
            ["train.global_batch_size=3"],
            "train.global_batch_size = 3 (command line): must be a multiple of the number of",
        ),
    ],
)
def test_a_wrong_command_line(train, monkeypatch, capsys, arguments, message):
    monkeypatch.setattr("dcscale.parallel.discover", lambda: Environment(0, 0, 2, 2, torch.device("cpu")))
    with pytest.raises(ExitError, match="2"):
        train.main(["data.train=x", "validation.interval=0", *arguments], Ending(leave))
    assert capsys.readouterr().err.startswith(f"error: the config has a problem:\n  - {message}")
