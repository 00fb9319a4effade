"""Which code a run is of."""

import subprocess

import torch

import dcscale
from dcscale.train.provenance import git_revision, versions


def git(folder, *words):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    return subprocess.run(["git", "-C", folder, *identity, *words], check=True, capture_output=True, text=True).stdout


def test_versions():
    found = versions()
    assert list(found) == ["dcscale", "python", "torch", "deepspeed", "safetensors", "numpy"]
    assert (found["dcscale"], found["torch"]) == (dcscale.__version__, torch.__version__)


def test_a_checkout_clean_and_dirty(tmp_path):
    assert git_revision(tmp_path) is None
    git(tmp_path, "init")
    assert git_revision(tmp_path) is None  # nothing is committed
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "one")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "untracked").write_text("does not count")
    commit = git(tmp_path, "rev-parse", "HEAD").strip()
    assert git_revision(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "code.py").write_text("a = 2\n")
    assert git_revision(tmp_path) == {"commit": commit, "dirty": True}
    # A package that is installed below somebody's repository is not of that repository.
    assert git_revision(tmp_path / "runs") is None


def test_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_revision() is None
