"""launch/install.sh when venv or pip fails, in a copy with fake commands."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(ROOT / "launch", folder / "launch", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def install(folder, python):
    """Runs install.sh with a fake Python, on a machine without a GPU."""
    commands = folder.parent / "commands"
    program(commands / "python", python)
    program(commands / "nvidia-smi", "exit 1")
    variables = {"PYTHON": str(commands / "python"), "PATH": f"{commands}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", str(folder / "launch" / "install.sh")],
        env={**os.environ, **variables},
        text=True,
        capture_output=True,
        timeout=60,
    )


# Debian's python3 without python3-venv fails and leaves a .venv with Python but without pip.
NO_VENV = 'case "$*" in *venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 1 ;; *pip*) exit 1 ;; esac'
# A venv whose pip cannot find any package.
NO_TORCH = """case "$*" in
    *venv*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *"pip --version") ;;
    *extra-index-url*) echo "second failure" >&2; exit 1 ;;
    *) echo "first failure" >&2; exit 1 ;;
esac"""


def test_an_incomplete_venv_is_removed(copy):
    result = install(copy, NO_VENV)
    assert result.returncode == 1
    assert "error: python -m venv failed; on Debian and Ubuntu: apt-get install python3-venv" in result.stderr
    assert not (copy / ".venv").exists()


def test_an_existing_venv_is_not_removed(copy):
    mine = copy / ".venv" / "mine"
    mine.parent.mkdir()
    mine.touch()
    assert install(copy, NO_VENV).returncode == 1
    assert mine.exists()


def test_a_venv_without_pip_is_created_again(copy):
    program(copy / ".venv" / "bin" / "python", "exit 1")
    result = install(copy, NO_TORCH)
    assert "Creating .venv" in result.stdout
    assert (copy / ".venv" / "bin" / "python").read_text().endswith(f"{NO_TORCH}\n")


def test_both_errors_of_pip_are_shown(copy):
    result = install(copy, NO_TORCH)
    assert result.returncode == 1
    assert "second failure\n" in result.stderr
    assert result.stderr.endswith("pip printed: first failure\n")
    assert not list((copy / ".venv").glob("installed-*"))
