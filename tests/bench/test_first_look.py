"""The steps of the first look on tiny calls, with invented times; and how they are run."""

import argparse
import importlib.util
import json
import math
import time
import types
from dataclasses import replace

import pytest
import torch

from dcscale.bench.attention import first_look
from dcscale.bench.attention.cases import Case
from dcscale.bench.attention.measure import WrongResultsError
from dcscale.cli import whole_number

pytest.importorskip("triton", reason="triton is not installed")

from dcscale.bench.attention.first_look import steps
from dcscale.bench.attention.first_look.steps import Look
from dcscale.bench.attention.first_look.verdicts import decide
from dcscale.ops.compose.triton.tiles import Launch, tiles_for

CASE = Case("bf16", 1, 256, 2, 128, None, 2)
VISIBLE = 2 * 256 * 257 / 2
GIB = 2**30
SASS = """
    /*0000*/   LDG.E R3, desc[UR6][R4.64] ;
    /*0010*/   FFMA R3, R3, R3, R3 ;
    /*0020*/   EXIT ;
"""


class Compiled:
    """Instead of a compiler: all kernels have the same code."""

    arch = 90

    def __call__(self, kernel, arguments, constants, warps, stages):
        return types.SimpleNamespace(registers=64, spilled=0, shared=1024, warps=warps, sass=SASS)


class Stopwatch:
    """Instead of a stopwatch: takes down what is timed, and says how long it took by its name."""

    def __init__(self, milliseconds=lambda name: 1.0):
        self.milliseconds, self.timed = milliseconds, []

    def __call__(self, runs, device, seconds, deadline, flushes=1):
        self.timed.append((set(runs), device, flushes))
        for run in runs.values():
            run()
        return {name: [1e6, self.milliseconds(name), 0.0] for name in runs}, {}


def look(**changes):
    """Of an H100 whose kernels are not launched."""
    needed = {"say": lambda text: None, "deadline": math.inf, "arch": 90, "memory": 80 * GIB}
    needed |= {"compiler": Compiled(), "clock": lambda run: 0.5, "time_in_turns": Stopwatch()}
    small = {"window": 20, "batches": (1, 2), "chunk_queries": (128, 256), "head_dims": (16, 32), "copy_bytes": 1000}
    fake = {"device": "cpu", "launch": lambda launch: None, "synchronize": lambda: None, "backend": "chunked"}
    return Look(**{**needed, "case": CASE, "seconds": 0.01, **small, **fake, **changes})


def test_facts_are_measured_and_the_model_takes_the_rate_of_memory():
    mine = look(case=replace(CASE, length=70, head_dim=8), time_in_turns=Stopwatch(lambda name: 2e-6))
    row = steps.facts(mine)
    assert row["copy_tb_s"] == pytest.approx(1.0)  # 2,000 bytes in 2e-6 ms
    assert (row["assumed_tb_s"], mine.rates.hbm) == (4.0, row["copy_tb_s"])
    assert {each["implementation"] for each in row["errors"]} >= {"chunked", "sdpa flash", "windowed"}
    timed = [each for each in row["rows"] if each["not_measured"] is None]
    assert {(each["kind"], each["window"]) for each in timed} >= {("chunked", None), ("chunked", 20), ("sdpa", None)}
    decisions = {each.question: each for each in decide("facts", row)}
    assert decisions["Which plain attention is the fastest?"].decision == "sdpa flash is the yardstick"
    assert "How far is compose from it, window 20?" in decisions


def test_a_backend_that_fails_its_self_test_gives_wrong_results():
    with pytest.raises(WrongResultsError, match="backend is 'fast', expected one of"):
        steps.facts(look(backend="fast"))


SMI = "#!/bin/sh\necho 'NVIDIA H100, 1980 MHz, 1980 MHz, 2619 MHz, 300.1 W, 700.0 W, 50'\necho 'another GPU'\n"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (SMI, {"name": "NVIDIA H100", "clocks.sm": "1980 MHz"}),
        ("#!/bin/sh\necho one, two\n", {"failed": "ValueError: zip() argument 2 is shorter than argument 1"}),
        ("#!/bin/sh\nexit 9\n", {"failed": "CalledProcessError: Command '['nvidia-smi', "}),
        (None, {"failed": "nvidia-smi is not installed"}),
    ],
)
def test_clocks_come_from_nvidia_smi_where_it_is(tmp_path, monkeypatch, script, expected):
    if script is not None:
        (tmp_path / "nvidia-smi").write_text(script)
        (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = steps.ask_nvidia_smi()
    assert all(found[name].startswith(text) for name, text in expected.items())
    assert ("temperature.gpu" in found) == (script == SMI)


def test_every_kernel_stands_next_to_the_model():
    said = []
    row = steps.kernels(look(say=said.append))
    rows = {(each["direction"], each["kernel"]): each for each in row["kernels"]}
    mixed = rows["backward", "compose_scores_backward"]
    assert mixed["ms"] == 0.5
    issue_ms = mixed["slots_in_all"] / (132 * 128 * 1.75e6) * VISIBLE
    assert mixed["efficiency"] == pytest.approx(issue_ms / 0.5)
    assert mixed["expected_ms"] > 0
    assert rows["backward", "sum_by_key"]["ms"] == 1.0  # two launches
    assert "measured ps" in said[0]
    assert row["model"]["rates"]["efficiency"]["value"] == row["model"]["efficiency"] == 0.45
    assert len(decide("kernels", row)) == 3


def test_kernels_are_timed_where_the_model_has_no_rates_or_fails():
    def broken(*arguments):
        raise OSError("no nvdisasm")

    for mine, problem in (
        (look(arch=100), "its rates are for compute capability 9.0, and this is 10.0"),
        (look(compiler=types.SimpleNamespace(arch=90, __call__=broken)), "TypeError: 'types.SimpleNamespace'"),
    ):
        row = steps.kernels(mine)
        assert row["kernels"][0]["ms"] > 0
        assert row["model"]["failed"].startswith(problem)
        (share,) = decide("kernels", row)
        assert share.decision.startswith(f"no model: {problem}")


def test_products_of_triton_stand_next_to_those_of_cublas():
    launched = []
    row = steps.products(look(launch=lambda launch: launched.append((launch.name, launch.chunk))))
    assert [(each["name"], each["queries"]) for each in row["products"]] == [
        (name, queries) for queries in (128, 256) for name in ("dcomposed", "out", "dv")
    ]
    for each in row["products"]:
        assert each["triton"] == each["16 bit"] == {"ms": 1.0}
        assert each["expected_ms"] > 0
        if not torch.cuda.is_available():
            assert each["32 bit"]["failed"].startswith("NotImplementedError")  # torch has no such product on a CPU
    # All keys in one chunk, and each product again to warm up and for the stopwatch.
    chunks = {chunk.row_queries: chunk for name, chunk in launched if name == "dv"}
    assert {queries: (each.first_key, each.row_keys) for queries, each in chunks.items()} == {
        128: (0, 256),
        256: (0, 256),
    }
    assert [name for name, _ in launched].count("dv") == 2 * 3
    assert decide("products", row)[0].question == "Product dcomposed, 256 queries: Triton or cuBLAS?"


def test_tiles_are_compared_with_the_table():
    def launch(each: Launch):
        if each.constants.get("BLOCK_T") == 16 and each.warps == 2 and "backward" in each.name:
            raise RuntimeError("does not fit")

    milliseconds = {"forward": 1.0, "both": 3.0}
    row = steps.tiles(look(launch=launch, time_in_turns=Stopwatch(lambda name: milliseconds[name[1]])))
    first, *others = row["tiles"]
    forward, backward = others[: len(steps.FORWARD_TILES)], others[len(steps.FORWARD_TILES) :]
    table = tiles_for(90, 2)
    assert (first["forward"], first["backward"]) == (table.forward, table.backward)
    assert (first["forward_ms"], first["backward_ms"]) == (1.0, 2.0)
    assert [each["forward"] for each in forward] == list(steps.FORWARD_TILES)
    assert [each["backward"] for each in backward] == list(steps.BACKWARD_TILES)
    assert [each.get("failed") for each in backward] == ["RuntimeError: does not fit", None, None]
    assert (row["arch"], row["ranks"]) == (90, 2)
    assert decide("tiles", row)[0].decision == "keep the table"
    assert steps.tiles(look(case=replace(CASE, rank=3)))["ranks"] == 4


def test_scratch_is_compared_with_the_default():
    mine = look(scratch_mib=(1, 4096), time_in_turns=Stopwatch(lambda name: 100.0 / name))
    row = steps.scratch(mine)
    assert [(each["mib"], each["default"]) for each in row["scratch"]] == [(1, False), (256, True), (4096, False)]
    little, default, much = row["scratch"]
    # Two chunks leave incomplete sums of the first 128 keys, which are written and read.
    assert little["expected_ms"] == pytest.approx(2 * 2 * 128 * 2 * 128 * 4 / 4e9)
    assert default["expected_ms"] == much["expected_ms"] == 0
    assert little["launches"] > default["launches"]
    assert (little["ms"], much["ms"]) == (100, 100 / 4096)
    assert decide("scratch", row)[0].decision.startswith("derive 4,096 MiB here")


def test_windows_are_timed_on_the_gpu_alone_and_in_python_alone():
    order = []
    stopwatch = Stopwatch(lambda name: 3.0 if name == "host" else 1.0)
    mine = look(
        time_in_turns=stopwatch,
        synchronize=lambda: order.append("synchronize"),
        launch=lambda launch: order.append(launch.name),
    )
    row = steps.windows(mine)
    one, two = row["windows"]
    assert (one["batch"], two["batch"]) == (1, 2)
    assert (one["host"], one["gpu"]) == ({"ms": 3.0}, {"ms": 1.0})
    assert one["launches"] == len([name for name in order if name != "synchronize"]) / 8  # warm and timed, twice each
    assert 0 < one["expected_ms"] < two["expected_ms"]
    # Twice as many flushes as Python needs to launch everything.
    assert stopwatch.timed[:2] == [({"empty the queue", "host"}, "cpu", 1), ({"gpu"}, "cpu", 120)]
    assert order[0] == "synchronize"
    assert decide("windows", row)[0].decision == "yes: it works 33% of the time"


def test_kernels_of_narrow_heads_stand_next_to_the_model():
    row = steps.head_dims(look())
    assert [each["head_dim"] for each in row["head_dims"]] == [16, 32]
    expected = [sum(kernel["expected_ms"] for kernel in each["kernels"]) for each in row["head_dims"]]
    assert 0 < expected[0] < expected[1]
    assert all(each.measured.startswith("1 of ") for each in decide("head_dims", row))


def test_what_is_kept_is_not_computed_again():
    launched = []
    stopwatch = Stopwatch(lambda name: {"recomputed": 10.0, "kept": 8.0}[name])
    row = steps.kept(look(launch=lambda launch: launched.append(launch.name), time_in_turns=stopwatch))
    assert [each["window"] for each in row["kept"]] == [None, 20]
    for each in row["kept"]:
        assert (each["recomputed"], each["kept"]) == ({"ms": 10.0}, {"ms": 8.0})
        assert each["expected_ms"] > 0
    # Of two windows, warm and timed: three times if recomputed, else twice.
    assert launched.count("scores") == launched.count("compose_scores") == 2 * 2 * (3 + 2)
    assert decide("kept", row)[0].decision.startswith("yes: 20% less")


def test_scratch_grows_until_everything_can_be_kept():
    large = look(case=replace(CASE, length=2048, heads=16), device="meta", memory=None)
    row = steps.kept(large)["kept"][0]
    assert not row["by_default"]
    assert row["mib"] > 256


def test_the_kernels_run():
    """Interpreted, or on a GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tiny = replace(CASE, dtype="fp32", length=128, heads=1, head_dim=16, rank=1)
    row = steps.products(look(case=tiny, device=device, launch=Launch.run, chunk_queries=(128,), arch=80))
    assert [each["triton"] for each in row["products"]] == [{"ms": 1.0}] * 3
    assert "expected_ms" not in row["products"][0]


def test_a_run_that_fails_or_comes_too_late_has_its_reason():
    mine = look()
    assert mine.times({"a": lambda: 1 / 0, "b": lambda: None}) == {
        "a": {"failed": "ZeroDivisionError: division by zero"},
        "b": {"ms": 1.0},
    }
    mine.time_in_turns = lambda runs, *_: ({}, dict.fromkeys(runs, "out of memory"))
    assert mine.times({"a": lambda: None}) == {"a": {"failed": "out of memory"}}
    mine.deadline = time.monotonic() - 1
    assert mine.times({"a": lambda: 1 / 0})["a"]["failed"] == "the time limit was reached (--minutes)"


def taken(mine, *chosen):
    """The exit code of some steps, and what is saved after each."""
    saved = []
    code = steps.take(mine, lambda found: saved.append(json.loads(json.dumps(found))), {f.__name__: f for f in chosen})
    return code, saved


def test_every_step_is_saved_and_a_failing_one_stops_nothing():
    def fails(mine):
        raise RuntimeError("no kernel\nand much more")

    said = []
    code, saved = taken(look(say=said.append), steps.scratch, fails, steps.tiles)
    assert code == 0
    assert [list(each["steps"]) for each in saved] == [
        ["scratch"],
        ["scratch", "fails"],
        ["scratch", "fails", "tiles"],
    ]
    assert saved[-1]["steps"]["fails"] == {"failed": "RuntimeError: no kernel", "seconds": 0.0}
    assert [each["decision"] for each in saved[-1]["decisions"]] == [
        "keep the default of 256 MiB",
        "failed: RuntimeError: no kernel",
        "keep the table",
    ]
    assert said[-1].splitlines()[3] == "| Step fails | - | - | failed: RuntimeError: no kernel | - |"


def test_a_row_that_cannot_be_judged_is_kept():
    def scratch(mine):
        return {"scratch": [{"mib": 3}]}

    _, saved = taken(look(), scratch)
    assert saved[0]["steps"]["scratch"]["scratch"] == [{"mib": 3}]
    assert saved[0]["decisions"][0]["decision"] == "failed: KeyError: 'default'"


def test_nothing_starts_after_the_deadline():
    _, saved = taken(look(deadline=time.monotonic() - 1), steps.scratch, steps.kept)
    assert {each["decision"] for each in saved[-1]["decisions"]} == {
        "failed: TimeoutError: the time limit was reached (--minutes)"
    }


def test_with_wrong_results_nothing_is_measured():
    code, saved = taken(look(backend="fast"), steps.facts, steps.kernels)
    assert code == 1
    assert len(saved) == 1
    assert saved[0]["steps"]["facts"]["failed"].startswith("backend is 'fast'")


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--heads", type=whole_number, nargs="+")
    parser.add_argument("--batch", type=whole_number, default=1)
    parser.add_argument("--head-dim", type=whole_number)
    fixed = ("dtype", "length", "window", "rank", "kinds", "quick", "seconds", "static", "markdown")
    parser.set_defaults(**dict.fromkeys(fixed), minutes=None, device="cpu")
    first_look.add_options(parser)
    options = parser.parse_args(arguments)
    first_look.check_options(parser, options)
    return parser, options


def test_what_is_measured_is_fixed(capsys):
    parsed("--batch", "2")
    parsed("--first-look")
    with pytest.raises(SystemExit):
        parsed("--first-look", "--heads", "2", "--head-dim", "3", "--batch", "1")
    assert "--first-look: what it measures is fixed; leave out --heads, --head-dim" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "installed", "interpreted", "message"),
    [
        ("cpu", True, "0", "it measures an NVIDIA GPU, and this is a CPU; --static models the kernels anywhere"),
        ("cuda", False, "0", "triton is not installed (pip install triton)"),
        ("cuda", True, "1", "TRITON_INTERPRET=1 is set, with which nothing is compiled; unset it"),
    ],
)
def test_a_look_that_is_not_possible_is_refused(tmp_path, capsys, monkeypatch, device, installed, interpreted, message):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    parser, options = parsed("--first-look")
    options.device = device
    with pytest.raises(SystemExit):
        first_look.run(parser, options, {}, tmp_path / "a.json", print)
    assert f"--first-look: {message}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_look_is_written_with_its_origin(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda: types.SimpleNamespace(total_memory=80 * GIB, major=9, minor=0)
    )
    monkeypatch.setattr(steps, "gpu_clock", lambda: None)
    looks = []

    def take(look, save):
        looks.append(look)
        save({"steps": {"facts": {}}})
        return 1

    monkeypatch.setattr(steps, "take", take)
    parser, options = parsed("--first-look")
    options.device = "cuda"
    said = []
    origin = {"machine": {"name": "NVIDIA H100"}, "versions": {"torch": "2.11", "flash-attn": None, "triton": "3.6"}}
    assert first_look.run(parser, options, origin, tmp_path / "a.json", said.append) == 1
    assert json.loads((tmp_path / "a.json").read_text()) == {**origin, "steps": {"facts": {}}}
    assert said == ["NVIDIA H100; torch 2.11, triton 3.6", f"written: {tmp_path / 'a.json'}"]
    (mine,) = looks
    assert (mine.arch, mine.compiler.arch, mine.memory, mine.device) == (90, 90, 80 * GIB, "cuda")
    assert 140 < mine.deadline - time.monotonic() <= 150
