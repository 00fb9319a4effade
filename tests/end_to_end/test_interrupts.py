"""Ctrl-C before training, without a checkpoint: one line, no traceback."""

import importlib.util
import os
from pathlib import Path

import pytest


def test_an_interrupt_before_training(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("launch_train", Path(__file__).parents[2] / "launch" / "train.py")
    train = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train)

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
