"""tools/bench_attention.py on small shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib import image

from dcscale.bench.attention import cases

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "bench_attention.py"
TINY = ["--device", "cpu", "--heads", "2", "--head-dim", "16", "--kinds", "dense", "chunked", "triton", "sdpa"]


@pytest.fixture(scope="module")
def tool(load_tool):
    return load_tool("bench_attention")


@pytest.fixture
def call(tool, caller):
    """Calls the tool in this process, with short measurements."""
    in_this_process = caller(tool)
    return lambda *arguments: in_this_process("--seconds", 0.1, *arguments)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Output and result file of the tool in its own process."""
    path = tmp_path_factory.mktemp("results") / "tiny.json"
    words = [*TINY, "windowed", "--length", "40", "70", "--window", "none", "16", "--dtype", "fp32", "--output", path]
    result = subprocess.run([sys.executable, TOOL, *words, "--seconds", "0.1"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return result.stdout, path


def test_the_result_is_complete(measured):
    _, path = measured
    result = json.loads(path.read_text())
    assert result["command"].startswith("python tools/bench_attention.py --device cpu --heads 2")
    assert {"date", "commit", "machine", "versions", "seconds", "errors", "targets", "rows"} <= result.keys()
    assert {"torch", "triton", "cuda", "python", "flash-attn", "flash-attn-3"} <= result["versions"].keys()
    cases = {(row["length"], row["window"]) for row in result["rows"]}
    assert cases == {(40, None), (40, 16), (70, None), (70, 16)}
    for case in cases:
        rows = {r["implementation"]: r for r in result["rows"] if (r["length"], r["window"]) == case}
        expected = {"dense", "chunked", "triton", "sdpa flash"} | ({"windowed"} if case[1] else set())
        assert rows.keys() == expected
        assert rows.pop("triton")["not_measured"]
        for row in rows.values():
            assert row["forward"]["ms"] > 0
            assert row["forward_backward"]["ms"] > 0
            assert row["peak_bytes"] > 0
            assert row["times_plain"]["of"] == "sdpa flash"
    checked = {(row["implementation"], row["window"]): row for row in result["errors"]}
    assert checked.keys() == {
        *((name, window) for name in ("dense", "chunked", "sdpa flash") for window in (None, 16)),
        ("windowed", 16),
    }
    assert checked["chunked", 16]["tensors"] == 16
    assert all(row["part_of_bound"] <= 1 for row in checked.values())
    assert {target["verdict"] for target in result["targets"]} == {"not measured"}


def test_the_table_shows_every_case_and_the_targets(measured):
    printed, path = measured
    lines = printed.splitlines()
    at = {
        text: next(i for i, line in enumerate(lines) if text in line) for text in ("errors 2/2", "case 1/4", "targets")
    }
    assert at["errors 2/2"] < at["case 1/4"] < at["targets"]
    assert sum(line.split()[:1] == ["chunked"] for line in lines) == 4
    assert sum("triton: not measured: " in line for line in lines) == 1  # printed once
    assert sum(line.startswith("  not measured  GPU: ") for line in lines) == 5
    assert sum(line.startswith("  not measured  CPU: ") for line in lines) == 16
    assert f"written: {path}" in lines
    row = json.loads(path.read_text())["rows"][0]
    shown = next(line for line in lines if line.split()[:1] == ["dense"]).split()
    assert shown[1:3] == [f"{row['forward']['ms']:.2f}", f"{row['forward_backward']['ms']:.2f}"]


def test_the_plot_is_next_to_the_result(measured):
    _, path = measured
    pixels = image.imread(path.with_suffix(".png"))
    assert pixels.shape[1] > 600
    assert len({tuple(colour) for colour in pixels.reshape(-1, pixels.shape[2])[::7].tolist()}) > 20


def test_the_readme_gets_its_tables_from_the_file(measured, call):
    _, path = measured
    result = json.loads(path.read_text())
    code, out, _ = call("--markdown", path)
    assert code == 0
    lines = out.splitlines()
    assert result["versions"]["torch"] in lines[0]
    assert result["command"] in lines[0]
    head = next(i for i, line in enumerate(lines) if line.startswith("| type |"))
    names = [cell.strip() for cell in lines[head].split("|")[1:-1]]
    table = [dict(zip(names, (c.strip() for c in line.split("|")[1:-1]))) for line in lines[head + 2 : head + 6]]
    assert [(row["T"], row["window"]) for row in table] == [("40", "-"), ("40", "16"), ("70", "-"), ("70", "16")]
    chunked = next(row for row in result["rows"] if row["implementation"] == "chunked")
    assert f"({chunked['times_plain']['forward_backward']:.3g}x)" in table[0]["chunked"]
    assert "(sdpa flash)" in table[0]["plain"]
    assert {row["triton"] for row in table} == {"not measured"}
    assert table[0]["windowed"] == "-"
    assert "ms" in table[1]["windowed"]
    assert sum(line.endswith("| not measured | this run was on cpu |") for line in lines) == 5


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"machine": 1, "versions": 2}', '{"rows": [{"not_measured": null}]}']
)
def test_a_file_that_is_not_a_result_is_rejected(tmp_path, call, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    code, out, err = call("--markdown", path)
    assert (code, out) == (2, "")
    assert f"error: --markdown {path}: " in err


def test_a_wrong_implementation_is_not_timed(tmp_path, call, monkeypatch):
    right = cases.compose_attention
    monkeypatch.setattr(cases, "compose_attention", lambda *a, **o: right(*a, **o) * 1.01)
    path = tmp_path / "a.json"
    code, out, err = call(*TINY, "--length", "40", "--window", "none", "--dtype", "fp32", "--output", path)
    assert code == 1
    assert "wrong results, so nothing is timed:" in err
    assert "chunked (fp32, B=1, T=321, H=2, D=16, no window): out: the error's norm is " in err
    assert "ms" not in out
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_there_is_no_plot_and_no_failure(tmp_path, call, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "a.json"
    code, out, _ = call(*TINY, "--length", "20", "--window", "none", "--dtype", "fp32", "--output", path)
    assert code == 0
    assert "no plot: matplotlib is not installed (pip install -c launch/constraints.txt matplotlib)" in out
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]


def test_without_plain_attention_there_is_no_plot(tmp_path, call):
    words = ["--device", "cpu", "--heads", "2", "--head-dim", "8", "--length", "20", "--window", "none"]
    code, out, _ = call(*words, "--kinds", "chunked", "--output", tmp_path / "a.json")
    assert code == 0
    assert "no plot: nothing was timed next to plain attention" in out


def test_by_default_the_file_is_named_after_the_device(tool, call, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "RESULTS", tmp_path)
    monkeypatch.setattr("dcscale.provenance.slug", lambda device: f"some-{device}")
    for extra, name in (([], "attention-some-cpu"), (["--quick"], "attention-some-cpu-quick")):
        assert call(*TINY, "--length", "20", "--window", "none", "--dtype", "fp32", *extra)[0] == 0
        assert (tmp_path / f"{name}.json").exists()
        assert (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--window", "0"], "argument --window: '0' must be a whole number of 1 or more"),
        (["--window", "wide"], "argument --window: 'wide' must be a whole number of 1 or more"),
        (["--length", "1e3"], "argument --length: '1e3' must be a whole number of 1 or more"),
        (["--heads", "-2"], "argument --heads: '-2' must be a whole number of 1 or more"),
        (["--dtype", "fp64"], "argument --dtype: invalid choice: 'fp64'"),
        (["--kinds", "magic"], "argument --kinds: invalid choice: 'magic'"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--minutes", "0"], "--minutes 0.0: must be above 0"),
        (["--minutes", "nan"], "--minutes nan: must be above 0"),
        (["--output", "a.txt"], "--output a.txt: must end in .json"),
        (["--output", "/no/such/folder/a.json"], "/no/such/folder is not a writable folder"),
        (["--markdown", "/no/such/file.json"], "--markdown /no/such/file.json: "),
        pytest.param(
            ["--device", "cuda"],
            "--device cuda: torch sees no NVIDIA GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_invalid_arguments_are_rejected(call, words, message):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert message in err
