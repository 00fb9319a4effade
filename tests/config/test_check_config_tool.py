"""tools/check_config.py: what it prints, and its exit status."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dcscale.config.reference import FIELDS, reference
from dcscale.lease import Lease
from dcscale.testing.runs import numbered_shards, write_token_shards

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_config.py"
VALID = ["data.train=shards", "validation.interval=0"]
NO_DATA = [*VALID, "--no-data"]


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
    assert main([str(path), *NO_DATA, "optimizer.learning_rate=3e-3", "--world-size", "3"]) == 0
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
    assert "micro-batches      of each rank, in sequences: 4 of 4 with 3 ranks\n" in output
    assert "parameters         87,671,040, of which compose 2,322,432\n" in output
    assert "FLOPs a token      5.718e+08 (forward and backward)\n" in output
    title, _, text = output.partition("DeepSpeed config for 3 ranks, generated:\n")
    assert title != output
    generated = json.loads(text.partition("\n\n")[0])
    assert generated["train_micro_batch_size_per_gpu"] == 4
    assert generated["gradient_accumulation_steps"] == 4
    assert generated["zero_optimization"]["stage"] == 1


def test_without_a_number_of_ranks_all_that_fit_are_shown(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*NO_DATA, "train.global_batch_size=6", "train.micro_batch_size=2"]) == 0
    output = capsys.readouterr().out
    shown = "3 of 2 with 1 rank, 3 of 1 with 2 ranks, 1 of 2 with 3 ranks, 1 of 1 with 6 ranks"
    assert f"micro-batches      of each rank, in sequences: {shown}\n" in output
    assert "DeepSpeed config for 1 rank, generated:" in output


def test_what_a_run_would_use_of_its_data_is_shown(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, sizes in (("web", [160, 161]), ("code", [150, 171])):
        write_token_shards(tmp_path / name, numbered_shards(sizes), vocab_size=500)
    size = ["data.sequence_length=32", "model.vocab_size=500", "train.steps=5", "train.global_batch_size=8"]
    size += ["validation.interval=0", "schedule.warmup_steps=0"]
    assert main([f"data.train={tmp_path / 'web'}", *size]) == 0
    assert "epochs             4\n" in capsys.readouterr().out
    sources = f"[{{name: web, path: {tmp_path / 'web'}, weight: 3}}, {{name: code, path: {tmp_path / 'code'}}}]"
    assert main([f"data.sources={sources}", *size]) == 0
    output = capsys.readouterr().out
    assert "of source web      30 sequences (75.00%), 3 epochs\n" in output
    assert "of source code     10 sequences (25.00%), 1 epochs\n" in output
    assert main([*NO_DATA]) == 0
    assert "epochs" not in capsys.readouterr().out.partition("FLOPs in all")[2]


def test_what_keeps_a_run_from_starting_is_printed(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = [f"data.train={tmp_path / 'no'}", "validation.interval=0", "optimizer.rules=[{match: nothing}]"]
    assert main([*arguments, f"run.folder={tmp_path / 'run'}"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f"the run cannot start:\n  - data.train: {tmp_path / 'no'}: no such folder")
    assert "\n  - optimizer.rules: 'nothing' applies to no parameter" in output.err
    assert main([*arguments, "--no-data"]) == 2
    assert capsys.readouterr().err.startswith("the run cannot start:\n  - optimizer.rules: 'nothing' applies to no")
    assert list(tmp_path.iterdir()) == []


def test_warnings_come_last_and_keep_no_run_from_starting(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_token_shards(tmp_path / "train", numbered_shards([160, 161]), vocab_size=500)
    arguments = [f"data.train={tmp_path / 'train'}", "validation.interval=0", "data.sequence_length=32"]
    arguments += [
        "model.vocab_size=500",
        "train.steps=101",
        "train.global_batch_size=8",
        f"run.folder={tmp_path / 'run'}",
    ]
    assert main([*arguments, "--device-gib", "0.5"]) == 0
    output = capsys.readouterr().out
    assert "epochs             80.8\n" in output
    warnings = output.rpartition("}\n\n")[2].splitlines()
    assert [line.partition(" = ")[0] for line in warnings] == [
        "warning    data.train",
        "warning    parallel.zero_stage",
    ]
    assert not (tmp_path / "run").exists()


def test_a_run_that_another_start_holds_is_reported(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_token_shards(tmp_path / "train", numbered_shards([160, 161]), vocab_size=500)
    size = ["data.sequence_length=32", "model.vocab_size=500", "train.steps=5", "schedule.warmup_steps=0"]
    arguments = [f"data.train={tmp_path / 'train'}", "validation.interval=0", f"run.folder={tmp_path / 'run'}", *size]
    with Lease(tmp_path / "run", "stop it"):
        lease = (tmp_path / "run" / "lease.json").read_bytes()
        assert main(arguments) == 0
        assert (tmp_path / "run" / "lease.json").read_bytes() == lease
    assert f"\nwarning    {tmp_path / 'run'} is held by process {os.getpid()} on " in capsys.readouterr().out


def test_every_problem_is_printed_with_its_origin(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("model:\n  heads: 7\n  windows: [0]\n")
    assert main([str(path), "train.global_batch_size=3", "--world-size", "2"]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert "the config has 5 problems:\n" in output.err
    assert f"  - model.heads = 7 ({path}:2): must divide model.dim = 768" in output.err
    assert f"  - model.windows[0] = 0 ({path}:3): must be at least 1" in output.err
    assert '  - data.train = "" (default): must not be empty' in output.err
    assert "  - train.global_batch_size = 3 (command line): must be a multiple of" in output.err
    assert "  - validation.interval = 500 (default): needs data.validation" in output.err


def test_what_cannot_be_loaded_is_printed(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps=3", "no-such.yaml", "--train.steps=3", "train.seed=1", "train.seed=2"]) == 2
    output = capsys.readouterr()
    assert "--train.steps=3 (command line): a setting has no dashes; write train.steps=3" in output.err
    assert 'train.seed = "2" (command line): is given twice' in output.err
    assert "no-such.yaml: there is no such file" in output.err
    assert "steps = 3 (command line): unknown key; did you mean train.steps?" in output.err


@pytest.mark.parametrize(
    ("option", "value", "rule"),
    [
        ("--world-size", "0", "a whole number of 1 or more"),
        *(("--device-gib", x, "a number above 0") for x in ("0", "nan", "x")),
    ],
)
def test_a_number_out_of_range_is_refused(
    main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str], option: str, value: str, rule: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main([*VALID, option, value])
    assert caught.value.code == 2
    assert f"argument {option}: '{value}' must be {rule}" in capsys.readouterr().err


def test_the_reference_is_printed(main: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--reference"]) == 0
    assert capsys.readouterr().out == reference() + "\n"


def test_where_torch_is_not_installed_the_rest_still_works(tmp_path: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['check_config', *sys.argv[1:]]; "
        f"runpy.run_path({str(TOOL)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *VALID, "--world-size", "8"]
    done = subprocess.run([*command, "--no-data"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "micro-batches      of each rank, in sequences: 1 of 8 with 8 ranks\n" in done.stdout
    assert done.stdout.endswith(
        "no parameter counts, DeepSpeed config, warnings and check of optimizer.rules: no torch\n"
    )
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "data and checkpoint cannot be checked: torch is not installed; give --no-data\n"
