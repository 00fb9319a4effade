"""The complete command on very little data: its JSON, and the report and targets made from it."""

import importlib.util
import json
from pathlib import Path

import pytest

from dcscale.bench.data import probe, rates, report
from dcscale.bench.data.reader import Settings

TOOL = Path(__file__).parents[2] / "tools" / "bench_data.py"
SMALL = {"epochs": 1, "latency": 0.001, "memory_shards": 2, "order_shards": 128, "planned_shards": 1000}


@pytest.fixture
def tool(monkeypatch):
    """The tool, with probes that run in this process."""
    spec = importlib.util.spec_from_file_location("bench_data", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(task, kind, settings, *, timeout=0, environment=None, **more):
        return json.loads(json.dumps(probe.TASKS[task](kind, settings, **more)))

    monkeypatch.setattr(probe, "run", run)
    return module


def test_a_small_run_end_to_end(tool, tmp_path, capsys):
    output = tmp_path / "result.json"
    arguments = ["--quick", "--kinds", "dcscale", "webdataset", "flat", "--workers", "0", "--tokens", "100_000"]
    arguments += ["--sequence-length", "64", "--output", str(output)]
    assert tool.main(arguments, tool.Sizes(**SMALL)) == 0
    result = json.loads(output.read_text())
    assert result["tokens"] == 32 * 3 * 16 * 64
    assert [(row["kind"], row["place"], row["not_measured"]) for row in result["rates"]] == [
        ("dcscale", "disk", None),
        ("webdataset", "disk", None),
        ("flat", "disk", None),
        ("dcscale", "http", None),
        ("dcscale", "http", None),
        ("webdataset", "http", None),
    ]
    for row in result["rates"]:
        figure = row["tokens_per_cpu_second"]
        assert 0 < figure["least"] <= figure["median"] <= figure["most"]
    assert result["amplification"][0]["given"] >= result["amplification"][0]["shards"] == 32
    assert [row["shards_read"] for row in result["restarts"]] == [8, 8]
    assert {row["verdict"] for row in result["targets"]} <= {"reached", "missed", "not measured"}
    tool.main(["--markdown", str(output)])
    shown = capsys.readouterr().out
    assert "| dcscale, no read-ahead | http | 0" in shown
    assert "no figure for litdata" in shown


def test_wrong_results_end_with_an_error(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "difference", lambda *_: "2 tokens differ from the data")
    output = tmp_path / "result.json"
    arguments = ["--quick", "--kinds", "flat", "--workers", "0", "--tokens", "50_000", "--sequence-length", "64"]
    assert tool.main([*arguments, "--output", str(output)], tool.Sizes(**SMALL)) == 1
    (row,) = json.loads(output.read_text())["rates"]
    assert row["not_measured"] == "wrong: 2 tokens differ from the data"


def test_other_options(tool, tmp_path, capsys):
    for arguments, message in (
        (["--output", str(tmp_path / "a.txt")], "must end in .json"),
        (["--output", str(tmp_path / "absent" / "a.json")], "is not a writable folder"),
        (["--tokens", "0"], "'0' must be a whole number of 1 or more"),
        (["--markdown", str(tmp_path / "absent.json")], "absent.json"),
    ):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert message in capsys.readouterr().err


def test_a_file_that_is_not_a_result_is_rejected(tool, tmp_path, capsys):
    (tmp_path / "a.json").write_text('{"rates": []}')
    with pytest.raises(SystemExit):
        tool.main(["--markdown", str(tmp_path / "a.json")])
    assert "it is not a result of bench_data: KeyError" in capsys.readouterr().err


def test_targets_are_judged_by_medians():
    def row(kind, workers, cpu, wall=1.0):
        figures = {"tokens_per_cpu_second": {"median": cpu}, "tokens_per_second": {"median": wall}}
        return {"kind": kind, "place": "disk", "workers": workers, "not_measured": None, **figures}

    found = report.judge({"rates": [row("dcscale", 0, 30e6), row("dcscale", 2, 1, 2.0), row("mosaic", 0, 10.1e6)]})
    verdicts = [each["verdict"] for each in found]
    assert verdicts == ["not measured", "missed", "not measured", "reached"]
    absent = rates.absent_row("litdata", "not installed: litdata")
    found = report.judge({"rates": [row("dcscale", 0, 30e6), absent]})
    assert found[0]["detail"] == "no figure for litdata"


def test_rounds_are_summarized_and_failures_are_reported(monkeypatch):
    case = rates.Case("flat", "disk", Settings("", 64, 4))
    epochs = iter([[{"tokens": 6, "wall_seconds": w, "cpu_seconds": 1}] for w in (1, 2, 3)])

    def run(*_, **__):
        return {"first_batch_seconds": 1, "wrong": None, "epochs": next(epochs)}

    monkeypatch.setattr(probe, "run", run)
    (row,) = rates.measure([case], Path("histogram"), 3, 1, float("inf"), print)
    assert (row["rounds"], row["tokens_per_second"]) == (3, {"median": 3, "least": 2, "most": 6})

    def fail(*_, **__):
        raise probe.ProbeError("ValueError: broken")

    monkeypatch.setattr(probe, "run", fail)
    (row,) = rates.measure([case], Path("histogram"), 3, 1, float("inf"), print)
    assert row["not_measured"] == "ValueError: broken"
