"""Error checks, what may be missing, and the contents of a measured row."""

import time
from dataclasses import replace

import pytest
import torch

from dcscale.bench.attention import cases as cases_module
from dcscale.bench.attention import measure as measure_module
from dcscale.bench.attention.cases import Case, Implementation, implementations
from dcscale.bench.attention.measure import Prediction, candidates, check_errors, measure
from dcscale.ops import compose_attention, flash
from dcscale.testing.attention import unfused_attention

DEVICE = "cpu"
CASE = Case(dtype="fp32", batch=1, length=70, heads=2, head_dim=8, window=20, rank=2)
NEVER = float("inf")


def run(case, kinds, *, broken=None, seconds=0.0, deadline=NEVER):
    rows = measure(case, kinds, broken or {}, DEVICE, seconds, deadline, Prediction(DEVICE))
    return {row["implementation"]: row for row in rows}


def wrong(tensor):
    """The chunked backend with an output, or a gradient, that is off by a thousandth."""

    def function(*arguments, **options):
        weight = arguments[3].q2
        error = torch.ones_like(weight) if tensor == "out" else weight - weight.detach()
        return compose_attention(*arguments, **options, backend="chunked") + 1e-3 * error.sum()

    return Implementation("mine", "chunked", function)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_correct_implementations_pass(dtype):
    case = replace(CASE.for_checks(), dtype=dtype)
    found, _ = candidates(case, dict.fromkeys(["dense", "chunked", "sdpa", "windowed"]), DEVICE)
    checked = check_errors(case, found, DEVICE)
    assert checked.failures == []
    passed = {row["implementation"]: row for row in checked.passed}
    assert {"dense", "chunked", "windowed"} < passed.keys()
    assert passed["chunked"]["tensors"] == 16
    assert passed["windowed"]["tensors"] == 4
    assert all(0 < row["part_of_bound"] <= 1 and row["dtype"] == dtype for row in passed.values())


@pytest.mark.parametrize("tensor", ["out", "pre.q2"])
def test_a_wrong_implementation_is_reported_with_tensor_error_and_bound(tensor):
    checked = check_errors(CASE, [wrong(tensor)], DEVICE)
    assert checked.passed == []
    assert len(checked.failures) == 1
    assert checked.failures[0].startswith(f"mine ({CASE}): {tensor}: the error's norm is ")
    assert " x " in checked.failures[0]


def fails(*_, **__):
    raise RuntimeError("no kernel\nand much more")


def test_a_baseline_that_cannot_run_is_missing_but_a_dcscale_backend_is_a_failure():
    checked = check_errors(
        CASE, [Implementation("baseline", "sdpa", fails), Implementation("own", "triton", fails)], DEVICE
    )
    assert checked.missing == {"baseline": "RuntimeError: no kernel"}
    assert checked.failures == [f"own ({CASE}): RuntimeError: no kernel"]


def test_a_row_has_times_ratios_flops_and_memory():
    rows = run(CASE, dict.fromkeys(["dense", "chunked", "sdpa", "windowed"]))
    sdpa = min((row for row in rows.values() if row["kind"] == "sdpa"), key=lambda row: row["forward_backward"]["ms"])
    for row in rows.values():
        assert row["not_measured"] is None
        assert (row["length"], row["window"]) == (70, 20)
        assert row["peak_bytes"] > 0
        flops = CASE.forward_flops(windowed=row["kind"] != "sdpa")
        for name, factor in (("forward", 1), ("forward_backward", 3.5)):
            times = row[name]
            assert times["rounds"] == 3
            assert 0 < times["quartiles_ms"][0] <= times["ms"] <= times["quartiles_ms"][1]
            assert times["tflops"] == pytest.approx(factor * flops / (times["ms"] * 1e-3) / 1e12)
            assert row["times_plain"][name] == pytest.approx(times["ms"] / sdpa[name]["ms"])
            assert row["times_windowed"][name] == pytest.approx(times["ms"] / rows["windowed"][name]["ms"])
        assert row["times_plain"]["of"] == sdpa["implementation"]
    assert rows["dense"]["peak_bytes"] > rows["windowed"]["peak_bytes"]


def test_the_compiled_formula_reports_its_compile_time(monkeypatch):
    compile_ = torch.compile

    def slowly(function, **options):
        assert options == {"dynamic": False, "fullgraph": True}
        compiled, calls = compile_(function, backend="aot_eager", **options), []

        def call(*arguments, **keywords):
            time.sleep(0 if calls else 0.5)
            calls.append(1)
            return compiled(*arguments, **keywords)

        return call

    monkeypatch.setattr(torch, "compile", slowly)
    row = run(CASE, {"dense-compiled": None})["dense-compiled"]
    assert 0.4 < row["compile_seconds"] < 60
    assert row["forward_backward"]["ms"] < 400


def test_without_sdpa_there_is_no_ratio():
    row = run(CASE, {"chunked": None})["chunked"]
    assert "times_plain" not in row
    assert "times_windowed" not in row


def test_skipped_implementations_have_their_reason():
    rows = run(CASE, {"chunked": None, "dense": "not today", "sdpa": None}, broken={"sdpa flash": "it is broken"})
    assert rows["dense"]["not_measured"] == "not today"
    assert rows["sdpa flash"]["not_measured"] == "it is broken"
    assert rows["chunked"]["not_measured"] is None


def test_nothing_starts_after_the_time_limit():
    rows = run(CASE, dict.fromkeys(["chunked", "sdpa"]), deadline=time.monotonic() - 1)
    assert {row["not_measured"] for row in rows.values()} == {"the time limit was reached (--minutes)"}


def test_the_dense_formula_is_skipped_if_memory_does_not_suffice(monkeypatch):
    case = replace(CASE, length=4096)
    monkeypatch.setattr(measure_module, "available_bytes", lambda device: 2**28)
    monkeypatch.setattr(cases_module, "unfused_attention", lambda *_, **__: pytest.fail("it was run"))
    row = run(case, {"dense": None})["dense"]
    assert row["not_measured"].startswith("it would need ")
    assert row["not_measured"].endswith(" GiB, but only 0.2 GiB are free")


def test_predicted_memory_matches_the_used_memory(monkeypatch):
    short, case = replace(CASE, length=128), replace(CASE, length=512)
    prediction = Prediction(DEVICE)
    (row,) = measure(short, {"dense": None}, {}, DEVICE, 0, NEVER, prediction)
    prediction.record("dense-compiled", short, row["peak_bytes"] // 2)
    (needed,) = (row["peak_bytes"] for row in measure(case, {"dense": None}, {}, DEVICE, 0, NEVER, Prediction(DEVICE)))
    for kind, right in (("dense", needed), ("dense-compiled", needed / 2)):
        for free, fits in ((0.8 * right, False), (1.3 * right, True)):
            monkeypatch.setattr(measure_module, "available_bytes", lambda device, free=free: free)
            assert (prediction.unavailable_reason(kind, case) is None) == fits


def too_large(*_, **__):
    return torch.empty(2**55, dtype=torch.int8, device=DEVICE)


def test_out_of_memory_is_reported_and_the_rest_continues(monkeypatch):
    monkeypatch.setattr(cases_module, "unfused_attention", too_large)
    rows = run(CASE, dict.fromkeys(["dense", "chunked"]))
    assert rows["dense"]["not_measured"].startswith("out of memory: ")
    assert rows["chunked"]["not_measured"] is None
    draw = Case.draw
    monkeypatch.setattr(Case, "draw", lambda self, device: too_large() if self == CASE else draw(self, device))
    assert run(CASE, {"chunked": None})["chunked"]["not_measured"].startswith("out of memory: ")


def test_later_failures_are_reported_for_baselines_and_raised_for_dcscale(monkeypatch):
    monkeypatch.setattr(cases_module, "_sdpa", fails)
    rows = run(CASE, dict.fromkeys(["chunked", "sdpa"]))
    assert rows["sdpa flash"]["not_measured"] == "it fails: RuntimeError: no kernel"
    assert rows["chunked"]["not_measured"] is None
    monkeypatch.setattr(cases_module, "compose_attention", fails)
    with pytest.raises(RuntimeError, match="no kernel"):
        run(CASE, {"chunked": None})


def test_implementations_that_need_a_gpu_report_it(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    found, missing = implementations(["triton", "flash-attn"], CASE.draw("cpu").to(torch.float32), "cpu")
    assert found == []
    assert "it needs an NVIDIA GPU" in missing["triton"]
    assert missing["flash-attn"] == "it needs an NVIDIA GPU, but q is on cpu"


def test_interpreted_kernels_are_not_timed(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found, missing = implementations(["triton"], CASE.draw(DEVICE).to(torch.float32), DEVICE)
    assert found == []
    assert missing["triton"].startswith("TRITON_INTERPRET=1 is set")


@pytest.mark.parametrize(
    ("here", "used"),
    [(["flash-attn"], "flash-attn"), (["flash-attn-4", "flash-attn-3", "flash-attn"], "flash-attn-3")],
)
def test_flash_attention_is_timed_where_it_runs(monkeypatch, here, used):
    """With PyTorch's attention instead of the packages."""
    monkeypatch.setattr(flash, "unavailable_reason", lambda q, package: None if package in here else "not here")
    made = set()

    def flash_attention(q, k, v, *, document_ids_BS, package, deterministic=True, **options):
        made.add((package, deterministic, options["window"]))
        return unfused_attention(q, k, v, **options)

    monkeypatch.setattr(flash, "flash_attention", flash_attention)
    kinds = dict.fromkeys(["flash-attn-4", "flash-attn-3", "flash-attn", "windowed"])
    found, missing = candidates(CASE, kinds, DEVICE)
    assert missing == dict.fromkeys(kinds.keys() - {*here, "windowed"}, "not here")
    rows = [name for package in here for name in (package, f"{package} deterministic")]
    assert [each.name for each in found] == [*rows, "windowed"]
    assert [each.name for each in found if each.note == "what dcscale uses"] == [f"{used} deterministic"]
    assert found[-1].note == f"through {used}"
    checked = check_errors(CASE, found, DEVICE)
    assert checked.failures == []
    assert len(checked.passed) == len(found)
    assert made == {(package, each, None) for package in here for each in (True, False)} | {(used, True, CASE.window)}
    measured = run(replace(CASE, window=None), kinds)
    assert {name for name, row in measured.items() if not row["not_measured"]} == set(rows)


def test_the_fastest_plain_attention_is_the_baseline():
    """Of all kinds of it, and without a window."""
    times = {"triton": 6.0, "sdpa": 3.0, "flash-attn-3": 2.0, "flash-attn": 4.0, "windowed": 1.0}
    rows = [
        {"kind": kind, "implementation": kind, "forward": {"ms": ms / 2}, "forward_backward": {"ms": ms}}
        for kind, ms in times.items()
    ]
    measure_module._add_ratios(rows)
    assert {row["times_plain"]["of"] for row in rows} == {"flash-attn-3"}
    assert rows[0]["times_plain"]["forward_backward"] == 3.0


def test_sdpa_names_its_backend_and_torchs_default():
    found, _ = candidates(CASE, {"sdpa": None}, DEVICE)
    assert "sdpa flash" in [each.name for each in found]
    assert [each.note for each in found].count("torch's default") == 1
