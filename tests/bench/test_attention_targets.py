"""The verdicts on the targets, from the rows of a run."""

import pytest

from dcscale.bench.attention.report import TARGETS, judge

GPU = {"device": "cuda", "threads": 16}
CPU = {"device": "cpu", "threads": 2}


def row(kind, ms, peak=0, implementation=None, **changes):
    case = {"dtype": "bf16", "batch": 1, "length": 4096, "heads": 32, "head_dim": 128, "window": None, "rank": 2}
    figures = {"not_measured": None, "forward_backward": {"ms": ms}, "peak_bytes": peak}
    return {**case, "implementation": implementation or kind, "kind": kind, **figures, **changes}


def verdicts(rows, machine):
    """Verdicts on the machine's targets, in the table's order; all others must be "not measured"."""
    found = judge(rows, machine)
    others = [v for v, target in zip(found, TARGETS) if target.device != machine["device"]]
    assert {(v["verdict"], v["ratio"], v["detail"]) for v in others} == {
        ("not measured", None, f"this run was on {machine['device']}")
    }
    return [v for v, target in zip(found, TARGETS) if target.device == machine["device"]]


def gpu_rows(milliseconds, peak, windowed):
    return [
        row("sdpa", 2.0, implementation="sdpa flash"),
        row("sdpa", 1.5, implementation="sdpa cudnn"),
        row("flash-attn-3", 1.0),
        row("flash-attn", 2.0),
        row("dense-compiled", 9.0),
        row("dense", 30.0, peak=800),
        row("triton", milliseconds, peak=peak),
        row("sdpa", 1.0, window=256),
        row("triton", windowed, window=256),
    ]


def test_all_targets_of_a_gpu_can_be_reached_and_missed():
    reached = verdicts(gpu_rows(3.0, 100, 1.0), GPU)
    assert [v["verdict"] for v in reached] == ["reached"] * 5
    assert [v["ratio"] for v in reached] == [3.0, 1.0, pytest.approx(1 / 3), 0.1, 0.125]
    assert "flash-attn-3" in reached[0]["detail"]  # the fastest
    missed = verdicts(gpu_rows(3.1, 101, 1.1), GPU)
    assert [v["verdict"] for v in missed] == ["missed"] * 5


def cpu_rows(without, windowed, peak):
    rows = []
    for dtype in ("fp32", "bf16"):
        cpu = {"dtype": dtype, "heads": 16, "head_dim": 64}
        for window, ms in ((None, without), (256, windowed)):
            rows.append(row("sdpa", 100.0, window=window, **cpu))
            for kind in ("chunked", "compiled"):
                rows.append(row(kind, ms, peak=peak, window=window, **cpu))
                rows.append(row(kind, 1.0, peak=1000, window=window, length=1024, **cpu))
    return rows


def test_all_targets_of_a_cpu_can_be_reached_and_missed():
    assert [v["verdict"] for v in verdicts(cpu_rows(300.0, 100.0, 4000), CPU)] == ["reached"] * 16
    assert [v["verdict"] for v in verdicts(cpu_rows(301.0, 101.0, 4001), CPU)] == ["missed"] * 16


def test_other_numbers_of_threads_affect_targets_of_time_only():
    found = verdicts(cpu_rows(300.0, 100.0, 4000), {"device": "cpu", "threads": 8})
    assert [v["verdict"] for v in found] == ["not measured"] * 8 + ["reached"] * 8
    assert found[0]["detail"] == "the target is for 2 threads, but this run had 8"


def test_missing_figures_are_named():
    rows = gpu_rows(3.0, 100, 1.0)
    without_dense = [each for each in rows if each["kind"] != "dense"]
    without_dense.append({**row("dense", 0), "not_measured": "it would need 100 GiB, but only 80 GiB are free"})
    found = verdicts(without_dense, GPU)
    assert [v["verdict"] for v in found] == ["reached", "reached", "reached", "not measured", "not measured"]
    assert found[3]["detail"] == "there is no figure for dense in this case"
    assert verdicts([], GPU)[0]["detail"] == "there is no figure for triton in this case"


@pytest.mark.parametrize("other", [{"batch": 2}, {"rank": 1}, {"heads": 16}, {"length": 2048}, {"dtype": "fp16"}])
def test_other_cases_do_not_count(other):
    rows = [{**each, **other} for each in gpu_rows(3.0, 100, 1.0)]
    assert {v["verdict"] for v in verdicts(rows, GPU)} == {"not measured"}
