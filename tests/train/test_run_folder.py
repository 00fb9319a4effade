"""Run folders that cannot be used are rejected with their path, and left unchanged."""

import pytest
import torch

from dcscale.checkpoint import CheckpointError
from dcscale.cluster.ending import Ending
from dcscale.observe import Console
from dcscale.parallel import Environment
from dcscale.testing.runs import tiny_config
from dcscale.train.build import _open_log, _open_reporter, _prepare_run_folder, _take_run_folder
from dcscale.train.restore.start import Start, StartKind
from dcscale.train.state import TrainState


def start(run):
    config, console = tiny_config(run, run), Console(enabled=False)
    lease = _take_run_folder(config, Environment(0, 0, 1, 1, torch.device("cpu")), console, None)
    _prepare_run_folder(run, config, Start(StartKind.FRESH, TrainState()), lease)
    ending = Ending()
    ending.hold(run, lease.token)
    _open_log(run, ending)
    ending.log.close()
    _open_reporter(run, 0, config, console, lease).close()
    lease.release()


def test_a_new_folder_is_created(tmp_path):
    start(tmp_path / "runs" / "new")
    created = {path.name for path in (tmp_path / "runs" / "new").iterdir()}
    assert created == {"checkpoints", "config.yaml", "logs", "metrics.jsonl", "tensorboard"}


@pytest.mark.parametrize("inside", ["", "below", "checkpoints", "logs", "metrics.jsonl", "tensorboard"])
def test_a_file_in_place_of_a_folder_is_an_error(tmp_path, inside):
    run = tmp_path / "run"
    file = run if inside in ("", "below") else run / inside
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"epoch": 1}\n')
    run = run / "below" if inside == "below" else run
    with pytest.raises(CheckpointError, match=r"run.folder .* cannot be used: .*; use another folder"):
        start(run)
    assert file.read_text() == '{"epoch": 1}\n'
