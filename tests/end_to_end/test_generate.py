"""tools/generate.py on a run's checkpoints, as a user would call it, and what load_trained refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dcscale.checkpoint import CheckpointError
from dcscale.models import generate
from dcscale.testing.distributed import run_distributed
from dcscale.testing.runs import make_shards, tiny_config, train_all
from dcscale.train.load import load_trained

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of ZeRO-3 on 2 ranks in bfloat16 and one of ZeRO-1 in float32, both sampling at their end."""
    folder = tmp_path_factory.mktemp("runs")
    shards = make_shards(tmp_path_factory.mktemp("data") / "shards")
    common = ["samples.interval=4", "samples.new_tokens=12", 'samples.prompts=["heads ","a"]', "checkpoint.interval=4"]
    configs = [
        tiny_config(folder / "zero3", shards, "parallel.zero_stage=3", "train.precision=bf16", *common),
        tiny_config(folder / "zero1", shards, "parallel.zero_stage=1", *common),
    ]
    run_distributed(train_all, 2, configs)
    shutil.rmtree(shards)  # a checkpoint must be enough
    return folder


def call(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "generate.py"), *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_the_checkpoint_alone_writes_what_the_training_run_wrote(runs, name):
    summary = json.loads((runs / name / "summary.json").read_text())
    trained = load_trained(runs / name, torch.device("cpu"))
    assert trained.step == 8
    assert next(trained.model.parameters()).dtype == (torch.bfloat16 if name == "zero3" else torch.float32)
    prompts = [trained.tokenizer.encode(text) for text in ("heads ", "a")]
    written = generate(trained.model, prompts, 12, temperature=0.8, top_p=0.95, seed=0, stop_id=256)
    assert summary["sample"] == "heads " + trained.tokenizer.decode(written[0])


def test_the_tool(runs):
    result = call(runs / "zero1", "--prompt", "heads ", "--prompt", "a", "--new-tokens", 10, "--temperature", 0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("----\n") == 2
    assert "----\nheads " in result.stdout
    assert "step-00000008 (step 8)" in result.stderr
    again = call(runs / "zero1", "--prompt", "heads ", "--prompt", "a", "--new-tokens", 10, "--temperature", 0)
    assert again.stdout == result.stdout
    older = call(runs / "zero1" / "checkpoints" / "step-00000004", "--prompt", "heads ", "--new-tokens", 4)
    assert "(step 4)" in older.stderr


def test_errors_of_the_tool(runs, tmp_path):
    for words, message in (
        ([tmp_path, "--prompt", "a"], "holds no checkpoint"),
        ([runs / "zero1", "--prompt", ""], "prompt 0 is empty"),
        ([runs / "zero1", "--prompt", "a", "--new-tokens", "0"], "new_tokens is 0"),
    ):
        result = call(*words)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "weights" / "model-00001.safetensors").unlink(), "model-00001.safetensors is missing"),
        (lambda f: edit_state(f, "tokenizer", None), "has no entry for the tokenizer"),
        (
            lambda f: (f / "config.yaml").write_text((f / "config.yaml").read_text().replace("dim: 32", "dim: 64")),
            "bytes",
        ),
    ],
)
def test_a_checkpoint_that_is_not_whole(runs, tmp_path, change, message):
    folder = tmp_path / "step-00000008"
    shutil.copytree(runs / "zero1" / "checkpoints" / "step-00000008", folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        load_trained(folder, torch.device("cpu"))


def edit_state(folder, key, value):
    """Changes state.json and the size that the marker expects of it."""
    path, marker = folder / "state.json", folder / "COMPLETE"
    state = json.loads(path.read_text())
    if value is None:
        del state[key]
    path.write_text(json.dumps(state))
    content = json.loads(marker.read_text())
    content["files"]["state.json"] = path.stat().st_size
    marker.write_text(json.dumps(content))
