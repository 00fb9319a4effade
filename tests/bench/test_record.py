"""The facts that a figure carries."""

import datetime
import json
import types

import torch

import dcscale
from dcscale.bench import record


def test_facts_say_where_when_how_and_with_what():
    facts = record.facts(["python", "a b.py", "--x"], "cpu", ["torch", "no-such-package"])
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
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert record.facts(["a"], "cpu")["commit"] is None
    monkeypatch.setenv("PATH", str(tmp_path))  # no git at all
    assert record.facts(["a"], "cpu")["commit"] is None


def test_a_gpu_gives_its_name(monkeypatch):
    gpu = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: gpu)
    assert record.slug("cuda") == "nvidia-h100-80gb-hbm3"
    machine = record.facts(["a"], "cuda")["machine"]
    assert (machine["name"], machine["compute_capability"], machine["gpu_memory_gib"]) == (gpu.name, "9.0", 80)
    assert machine["processor"] != gpu.name


def test_a_processor_gives_its_model_without_marks(monkeypatch):
    monkeypatch.setattr(record, "_processor", lambda: "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz")
    assert record.slug("cpu") == "intel-xeon-platinum-8481c-cpu-2-70ghz"
