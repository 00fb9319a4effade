"""tools/check_config.py: what it prints, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dcscale.config.reference import FIELDS, reference
from dcscale.testing.runs import numbered_shards, write_token_shards

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_config.py"
VALID = ["data.train=shards", "validation.interval=0"]


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("check_config_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_a_valid_config_is_shown_with_origins_numbers_and_the_deepspeed_config(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("train:\n  steps: 500\n  global_batch_size: 48\n  micro_batch_size: 4\n")
    assert main([str(path), *VALID, "optimizer.learning_rate=3e-3", "--world-size", "3"]) == 0
    output = capsys.readouterr().out
    settings = dict(line.split(" = ", 1) for line in output.splitlines() if " = " in line)
    settings = {path.strip(): value.rsplit("  # ", 1) for path, value in settings.items()}
    assert set(settings) == set(FIELDS)
    assert [part.strip() for part in settings["train.steps"]] == ["500", f"{path}:2"]
    assert [part.strip() for part in settings["optimizer.learning_rate"]] == ["0.003", "command line"]
    assert [part.strip() for part in settings["run.folder"]] == ['"runs/run"', "default"]
    assert len({line.index(" = ") for line in output.splitlines() if " = " in line}) == 1  # in columns
    assert f"tokens a step      {48 * 1024:,}\n" in output
    assert f"tokens in all      {48 * 1024 * 500:,}\n" in output
    assert "micro-batches      4 x 3 ranks\n" in output
    assert "parameters         87,671,040, of which compose 2,322,432\n" in output
    assert "FLOPs a token      5.718e+08 (forward and backward)\n" in output
    title, _, text = output.partition("DeepSpeed config for 3 ranks, generated:\n")
    assert title != output
    generated = json.loads(text)
    assert generated["train_micro_batch_size_per_gpu"] == 4
    assert generated["gradient_accumulation_steps"] == 4
    assert generated["zero_optimization"]["stage"] == 1


def test_without_a_number_of_ranks_all_that_fit_are_shown(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*VALID, "train.global_batch_size=12", "train.micro_batch_size=2"]) == 0
    output = capsys.readouterr().out
    assert "micro-batches      6 x 1 rank, 3 x 2 ranks, 2 x 3 ranks, 1 x 6 ranks\n" in output
    assert "DeepSpeed config for 1 rank, generated:" in output


def test_what_a_run_would_use_of_its_data_is_shown(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("web", "code"):
        write_token_shards(tmp_path / name, numbered_shards([160, 161]), vocab_size=500)
    size = ["data.sequence_length=32", "model.vocab_size=500", "train.steps=5", "train.global_batch_size=8"]
    size += ["validation.interval=0", "schedule.warmup_steps=0"]
    assert main([f"data.train={tmp_path / 'web'}", *size]) == 0
    assert "epochs             4\n" in capsys.readouterr().out
    sources = f"[{{name: web, path: {tmp_path / 'web'}, weight: 3}}, {{name: code, path: {tmp_path / 'code'}}}]"
    assert main([f"data.sources={sources}", *size]) == 0
    output = capsys.readouterr().out
    assert "of source web      30 sequences (75.00%), 3 epochs\n" in output
    assert "of source code     10 sequences (25.00%), 1 epochs\n" in output
    assert main(VALID) == 0
    assert "epochs             unknown: shards: no such folder" in capsys.readouterr().out
    assert main(["data.train=http://127.0.0.1:9/x", "validation.interval=0"]) == 0
    assert "epochs" not in capsys.readouterr().out.partition("FLOPs in all")[2]


def test_every_problem_is_printed_with_its_origin(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  heads: 7\n  windows: [0]\n")
    assert main([str(path), "train.global_batch_size=3", "--world-size", "2"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "the config has 5 problems:\n" in output.err
    assert f"  - model.heads = 7 ({path}:2): must divide model.dim = 768" in output.err
    assert f"  - model.windows[0] = 0 ({path}:3): must be at least 1" in output.err
    assert '  - data.train = "" (default): must not be empty' in output.err
    assert "  - train.global_batch_size = 3 (command line): must be a multiple of" in output.err
    assert "  - validation.interval = 500 (default): needs data.validation" in output.err


def test_what_cannot_be_loaded_is_printed(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps=3", "no-such.yaml"]) == 1
    output = capsys.readouterr()
    assert "no-such.yaml: there is no such file" in output.err
    assert "steps = 3 (command line): unknown key; did you mean train.steps?" in output.err


def test_a_world_size_below_1_is_refused(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*VALID, "--world-size", "0"])
    assert caught.value.code == 2
    assert "argument --world-size: '0' must be a whole number of 1 or more" in capsys.readouterr().err


def test_the_reference_is_printed(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reference"]) == 0
    assert capsys.readouterr().out == reference() + "\n"


def test_where_torch_is_not_installed_the_rest_still_works(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['check_config', *sys.argv[1:]]; "
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *VALID, "--world-size", "8"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "micro-batches      1 x 8 ranks\n" in done.stdout
    assert done.stdout.endswith("no parameter counts and no DeepSpeed config: torch is not installed\n")
