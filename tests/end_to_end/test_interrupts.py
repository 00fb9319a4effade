"""launch/train.py before training: Ctrl-C and a wrong command line end it with a message, without a traceback."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from dcscale.parallel import Environment


@pytest.fixture
def train():
    spec = importlib.util.spec_from_file_location("launch_train", Path(__file__).parents[2] / "launch" / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_interrupt_before_training(train, monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    def leave(code):
        raise SystemExit(code)

    monkeypatch.setattr("dcscale.parallel.discover", interrupt)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as ended:
        train.main(["train.steps=1"])
    assert ended.value.code == 130
    assert capsys.readouterr().err.startswith("interrupted: earlier checkpoints are complete")


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
    assert train.main(["data.train=x", "validation.interval=0", *arguments]) == train.UNFIT
    assert capsys.readouterr().err.startswith(f"error: the config has a problem:\n  - {message}")
