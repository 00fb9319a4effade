"""What a run's folder may be: what cannot be used is refused with its name, and left as it is."""

import pytest

from dcscale.checkpoint import CheckpointError
from dcscale.observe import Console
from dcscale.testing.runs import tiny_config
from dcscale.train.build import _open_reporter, _start_folder
from dcscale.train.restore.start import Start, StartKind
from dcscale.train.state import TrainState


def begin(run):
    config = tiny_config(run, run)
    _start_folder(run, config, Start(StartKind.FRESH, TrainState()))
    _open_reporter(run, 0, config, Console(enabled=False), is_main=True).close()


def test_a_new_folder_is_made(tmp_path):
    begin(tmp_path / "runs" / "new")
    made = {path.name for path in (tmp_path / "runs" / "new").iterdir()}
    assert made == {"checkpoints", "config.yaml", "metrics.jsonl", "tensorboard"}


@pytest.mark.parametrize("inside", ["", "below", "checkpoints", "metrics.jsonl", "tensorboard"])
def test_a_file_in_the_way_is_named(tmp_path, inside):
    run = tmp_path / "run"
    file = run if inside in ("", "below") else run / inside
    file.parent.mkdir(exist_ok=True)
    file.write_text('{"epoch": 1}\n')
    run = run / "below" if inside == "below" else run
    with pytest.raises(CheckpointError, match=r"run.folder .* cannot be used: .*; name another folder"):
        begin(run)
    assert file.read_text() == '{"epoch": 1}\n'
