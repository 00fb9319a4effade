"""Which code, which machine and which versions a figure is of."""

import datetime
import json
import subprocess
import types

import pytest
import torch

import dcscale
from dcscale import provenance
from dcscale.provenance import git_revision, versions


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


def test_facts_say_where_when_how_and_with_what():
    facts = provenance.facts(["python", "a b.py", "--x"], "cpu", ["torch", "no-such-package"])
    assert json.loads(json.dumps(facts)) == facts
    assert facts["command"] == "python 'a b.py' --x"
    age = datetime.datetime.now(datetime.timezone.utc) - datetime.datetime.fromisoformat(facts["date"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)
    assert facts["versions"]["dcscale"] == dcscale.__version__
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["versions"]["no-such-package"] is None
    machine = facts["machine"]
    assert machine["device"] == "cpu"
    assert machine["name"] == machine["processor"] != ""
    assert machine["threads"] == torch.get_num_threads()
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0


def test_outside_of_a_checkout_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "git_revision", lambda: None)
    assert provenance.facts(["a"], "cpu")["commit"] is None


@pytest.mark.parametrize(("dirty", "ending"), [(False, ""), (True, "-dirty")])
def test_a_commit_says_whether_files_differ_from_it(monkeypatch, dirty, ending):
    monkeypatch.setattr(provenance, "git_revision", lambda: {"commit": "0123456789abcdef", "dirty": dirty})
    assert provenance.facts(["a"], "cpu")["commit"] == "0123456789ab" + ending


def test_a_gpu_gives_its_name(monkeypatch):
    gpu = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    assert provenance.slug("cuda") == "nvidia-h100-80gb-hbm3"
    machine = provenance.facts(["a"], "cuda")["machine"]
    assert (machine["name"], machine["compute_capability"], machine["gpu_memory_gib"]) == (gpu.name, "9.0", 80)
    assert machine["processor"] != gpu.name


def test_a_processor_gives_its_model_without_marks(monkeypatch):
    monkeypatch.setattr(provenance, "_processor", lambda: "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
    assert provenance.slug("cpu") == "intel-xeon-platinum-8481c-cpu-2-70ghz"
