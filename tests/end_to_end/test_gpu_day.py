"""Everything that tools/gpu/day.sh uses exists: it runs rarely, where mistakes cannot be fixed."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dcscale.config import check_config, load_config

ROOT = Path(__file__).parents[2]
GPU = ROOT / "tools" / "gpu"

DAY = (GPU / "day.sh").read_text()
LIMITS = {name: int(seconds) for name, seconds in re.findall(r"^stage (\w+) (\d+) ", DAY, re.MULTILINE)}
"""Seconds of every stage."""

RECORDER = """#!{python}
import json, os, sys
if sys.argv[1:2] == ["-c"]:  # paths of the standard library and the like
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
"""


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """Arguments of every python3 command in day.sh, recorded by a fake python3."""
    folder = tmp_path_factory.mktemp("gpu")
    log = folder / "log"
    shutil.copytree(GPU, folder / ".gpu", ignore=shutil.ignore_patterns("__pycache__"))
    for name, script in {
        "python3": RECORDER.format(python=sys.executable, log=str(log)),
        "nvidia-smi": "#!/bin/sh",
    }.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(script)
        path.chmod(0o755)
    environment = {**os.environ, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "OUT": str(folder / "out")}
    environment["STAGES"] = " ".join(LIMITS)
    subprocess.run(["bash", ".gpu/day.sh"], cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
    return [json.loads(line) for line in log.read_text().splitlines()]


def _help(*command):
    done = subprocess.run([sys.executable, *command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_default_stages_end_within_ten_minutes():
    default = re.search(r"STAGES:-([\w ]+)}", DAY).group(1).split()
    assert default == ["facts", "tests", "first_look", "attention", "train", "profile"]
    assert default == [name for name in LIMITS if name not in ("counters", "tune")]  # in the order of the script
    assert sum(LIMITS[name] for name in default) < 600


def test_tools_stop_by_themselves_before_their_stage_is_stopped(commands):
    minutes = {}
    for command in commands:
        if command[0] == "tools/bench_attention.py":
            stage = "first_look" if "--first-look" in command else "attention"
            minutes[stage] = float(command[command.index("--minutes") + 1])
    assert minutes.keys() == {"first_look", "attention"}
    assert all(60 * minutes[stage] < LIMITS[stage] for stage in minutes)


def test_all_stages_are_covered(commands):
    kinds = {command[1] if command[0] == "-m" else command[0] for command in commands}
    assert {"pytest", "tools/bench_attention.py", "launch/train.py", ".gpu/profile_step.py"} <= kinds
    assert "dcscale.ops.compose.triton.tune" in kinds


def test_flags_exist(commands):
    helps = {}
    for command in commands:
        program = command[:2] if command[0] == "-m" else command[:1]
        flags = [argument for argument in command[len(program) :] if argument.startswith("--")]
        if flags and program != ["-m", "pytest"]:
            text = helps.setdefault(tuple(program), _help(*program))
            for flag in flags:
                assert re.search(rf"{flag}\b", text), (program, flag)
    assert len(helps) >= 3


def test_tests_are_found(commands):
    [command] = [command for command in commands if command[:2] == ["-m", "pytest"]]
    listing = [sys.executable, *command, "--collect-only"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_trainings_have_valid_configs(commands):
    trainings = [command[1:] for command in commands if command[0] == "launch/train.py"]
    assert len(trainings) == 4
    for arguments in trainings:
        files = [str(ROOT / argument) for argument in arguments if "=" not in argument]
        settings = [argument for argument in arguments if "=" in argument]
        assert check_config(load_config(files, settings).config, world_size=1) == []


def test_the_profile_imports_what_exists():
    for node in ast.walk(ast.parse((GPU / "profile_step.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert all(hasattr(import_module(node.module), alias.name) for alias in node.names)


def test_prepared_packages_are_pinned():
    script = (GPU / "prepare.sh").read_text()
    pinned = (ROOT / "launch" / "constraints.txt").read_text()
    names = re.findall(r"\$\(pin (\w+)\)", script)
    assert names
    for name in names:
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name
