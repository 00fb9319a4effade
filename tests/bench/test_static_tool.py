"""tools/bench_attention.py --static: kernels compiled ahead of time, the report, and its options."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from dcscale.bench.attention.cases import Case
from dcscale.bench.attention.static import tool
from dcscale.bench.attention.static.cost import Rates
from dcscale.cli import ResultError, whole_number

pytest.importorskip("triton", reason="triton is not installed")

from dcscale.bench.attention.static import compilation
from dcscale.bench.attention.static.report import MODEL, assumption_lines, lines, markdown

CASE = Case("bf16", 1, 256, 4, 128, None, 2)
VISIBLE = 4 * 256 * 257 // 2
SASS = """
    /*0000*/   @P0 EXIT ;
    /*0010*/   UMOV UR4, 0x4 ;
.L_x_0:
    /*0020*/   LDG.E R3, desc[UR6][R4.64] ;
    /*0030*/   FFMA R3, R3, R3, R3 ;
    /*0040*/   UIADD3 UR4, UR4, -0x1, URZ ;
    /*0050*/   ISETP.NE.AND P1, PT, RZ, UR4, PT ;
    /*0060*/   @P1 BRA `(.L_x_0) ;
    /*0070*/   HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], R24 ;
    /*0080*/   EXIT ;
"""


class Compiled:
    """Instead of a compiler: all kernels have the same code."""

    def __init__(self, arch):
        self.arch = arch

    def __call__(self, kernel, arguments, constants, warps, stages):
        return SimpleNamespace(registers=64, spilled=8, shared=1024, warps=warps, sass=SASS)


@pytest.fixture(scope="module")
def call():
    return tool.model_case(CASE, Compiled(90), Rates())


@pytest.fixture(scope="module")
def result(call):
    return {"what": MODEL, "date": "2026-11-26T10:00:00", "calls": [{"versions": {"triton": "3.7.1"}, **call}]}


def kernel(call, name, direction="forward"):
    (row,) = (row for row in call["kernels"] if (row["kernel"], row["direction"]) == (name, direction))
    return row


def test_a_call_is_modelled_by_its_tiles_and_code(call):
    row = kernel(call, "compose_scores")
    tiles, threads = row["tiles"], 32 * row["warps"]
    slots = ((tiles["interior"] + tiles["edge"]) * 24 + tiles["unseen"] * 1) * threads / VISIBLE
    assert row["slots_in_all"] == pytest.approx(slots)
    assert row["instructions"] == {"interior": 24, "edge": 24, "unseen": 1}
    assert row["loops"] == pytest.approx([4 * 5 * threads / (4 * 32 * 64)])
    assert row["loops_with_assumed_trips"] == 0
    assert (row["registers"], row["spilled"], row["shared"]) == (64, 8, 1024)
    assert row["ps"] >= row["bounds"]["HBM"] > 0
    assert kernel(call, "scores")["products_with_a_in_registers"] == 1
    assert kernel(call, "scores")["slots"] == {}


def test_sums_and_ratios_add_up(call):
    for direction in ("forward", "backward"):
        rows = [row for row in call["kernels"] if row["direction"] == direction]
        sums = call["sums"][direction]
        assert sums["ps"] == pytest.approx(sum(row["ps"] for row in rows))
        assert sums["launches"] == sum(row["launches"] for row in rows if row["kind"] != "torch")
    both = call["sums"]["both"]
    assert both["ps"] == pytest.approx(sum(call["sums"][each]["ps"] for each in ("forward", "backward")))
    assert call["times_flash"]["version_2"]["both"] == pytest.approx(both["ps"] / (3.5 * 1.3))
    assert call["times_flash"]["version_3"]["forward"] == pytest.approx(call["sums"]["forward"]["ps"] / 0.8)


def test_a_window_is_compared_with_attention_to_all_keys():
    windowed = tool.model_case(Case("bf16", 1, 1024, 4, 128, 128, 2), Compiled(90), Rates())
    share = (1024 * 128 - 128 * 127 / 2) / (1024 * 1025 / 2)
    assert windowed["times_flash"]["version_2"]["forward"] == pytest.approx(
        windowed["sums"]["forward"]["ps"] * share / 1.3
    )


def test_what_forward_keeps_under_activation_checkpointing_is_modelled_too(call):
    kept, sums = call["kept"], call["sums"]
    assert kept["sums"]["forward"]["ps"] > sums["forward"]["ps"]
    assert kept["sums"]["backward"]["ps"] < sums["backward"]["ps"]
    (line,) = (line for line in lines(call) if "kept under activation checkpointing, with the default scratch" in line)
    assert line.endswith(", ".join(f"{each} {kept['sums'][each]['ps']:.1f} ps" for each in ("forward", "backward")))
    large = tool.model_case(replace(CASE, length=8192, heads=32), Compiled(90), Rates())
    assert not large["kept"]["by_default"]
    assert any(f"with {large['kept']['scratch_mib']} MiB of scratch: forward" in line for line in lines(large))


def test_the_table_says_that_it_is_a_model_and_flags_what_is_wrong(call):
    table = lines(call)
    assert f"sm_90, bf16 B=1 T=256 H=4 D=128 R=2, no window: {MODEL}" in table[0]
    assert any("f scores (wgmma with A in registers!)" in line for line in table)
    assert any("x both: FlashAttention-3" in line for line in table)
    assert "measured ps" not in table[1]
    assert all(MODEL in line or "=" in line or "FlashAttention" in line for line in assumption_lines(Rates()))


@pytest.mark.parametrize(("arch", "dtype"), [(80, "bf16"), (90, "fp32")])
def test_other_gpus_and_float32_have_no_times(arch, dtype):
    other = tool.model_case(replace(CASE, dtype=dtype), Compiled(arch), Rates())
    assert "ps" not in kernel(other, "compose_scores")
    assert kernel(other, "compose_scores")["slots_in_all"] > 0
    assert "no times: the model's rates are for sm_90 and 16-bit input" in lines(other)[-1]


def test_other_head_dims_have_no_ratios():
    odd = tool.model_case(replace(CASE, head_dim=96), Compiled(90), Rates())
    assert odd["times_flash"] is None
    assert "no figure of FlashAttention for a head dim of 96" in lines(odd)[-1]


def test_measured_times_stand_next_to_the_model_with_the_efficiency():
    measured = tool.model_case(CASE, Compiled(90), Rates(), timed=("meta", lambda run: 2e-3))
    row = kernel(measured, "compose_scores")
    assert row["measured_ps"] == pytest.approx(2e-3 * 1e9 / VISIBLE)
    issue_ps = row["slots_in_all"] * 1e3 / (132 * 128 * 1.75)
    assert row["efficiency"] == pytest.approx(issue_ps / row["measured_ps"])
    assert kernel(measured, "scores")["efficiency"] is None
    assert kernel(measured, "sum_by_key", "backward")["measured_ms"] == pytest.approx(4e-3)
    assert "measured_ms" not in kernel(measured, "torch operators", "backward")
    table = lines(measured)
    assert table[1].endswith("measured ps  efficiency")
    assert any("f compose_scores" in line and line.endswith(f"{row['efficiency']:.2f}") for line in table)


def test_a_result_is_a_markdown_table_next_to_an_earlier_one(result):
    before = json.loads(json.dumps(result))
    before["calls"][0]["sums"]["forward"]["slots_in_all"] = 92.0
    (head, _, line) = markdown(result, before).splitlines()[2:]
    assert "slots forward" in head
    slots = result["calls"][0]["sums"]["forward"]["slots_in_all"]
    assert line.startswith(f"| sm_90, Triton 3.7.1, H=4, D=128 | 92.0 -> {slots:.1f} | ")
    assert MODEL in markdown(result).lower()
    assert " -> " not in markdown(result)
    before["calls"][0]["case"]["length"] = 512
    assert markdown(result, before) == markdown(result)


def test_what_is_no_static_result_is_refused():
    with pytest.raises(ResultError, match="not a static result of bench_attention: KeyError 'date'"):
        markdown({})


def options_of(*arguments):
    parser = argparse.ArgumentParser()
    for name in ("--heads", "--head-dim", "--length"):
        parser.add_argument(name, type=whole_number, nargs="+")
    parser.add_argument("--window", type=int, nargs="+")
    parser.add_argument("--output", type=Path)
    parser.set_defaults(dtype=None, batch=1, rank=2)
    tool.add_options(parser)
    options = parser.parse_args(arguments)
    tool.check_options(parser, options)
    return parser, options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "90"], "--arch: is an option of --static"),
        (["--assume", "hbm=3"], "--assume: is an option of --static"),
        (["--before", "x.json"], "--before: is an option of --static"),
        (["--add", "--output", "x.json"], "--add: is an option of --static"),
        (["--static", "--add"], "--add: needs the result to add to; give --output"),
        (["--static", "--arch", "70"], "invalid choice: 70"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    with pytest.raises(SystemExit):
        options_of(*arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("interpreted", "installed", "message"),
    [
        ("0", True, "--assume 'hbm=fast': 'fast' must be a number above 0"),
        ("1", True, "--static: TRITON_INTERPRET=1 is set, with which nothing can be compiled; unset it"),
        ("0", False, "--static: triton is not installed (pip install triton)"),
    ],
)
def test_a_run_that_is_not_possible_is_refused(interpreted, installed, message, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", interpreted)
    if not installed:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    parser, options = options_of("--static", "--assume", "hbm=fast")
    with pytest.raises(SystemExit):
        tool.run(parser, options, print)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "[", "[]", '{"rows": []}'])
def test_only_a_static_result_can_be_added_to(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    parser, options = options_of("--static", "--add", "--output", str(path))
    with pytest.raises(SystemExit):
        tool.run(parser, options, print)
    assert f"--add: {path} is not a static result" in capsys.readouterr().err


def test_a_run_can_be_added_to_an_earlier_result(call, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(compilation, "Compiler", Compiled)
    (tmp_path / "x.json").write_text(json.dumps({"calls": ["earlier"]}))
    parser, options = options_of("--static", "--length", "256", "--heads", "4", "--window", "64")
    assert len(tool.run(parser, options, print)["calls"]) == 1
    options.add, options.output = True, tmp_path / "x.json"
    earlier, added = tool.run(parser, options, print)["calls"]
    assert (earlier, added["case"]["window"]) == ("earlier", 64)


def test_the_cases_are_those_of_the_published_table_or_the_given_ones():
    default = [*tool.cases(options_of("--static")[1])]
    assert {(case.heads, case.head_dim, case.window) for case in default} == {
        (heads, head_dim, window) for heads, head_dim in tool.SHAPES for window in (None, 256)
    }
    (given,) = tool.cases(options_of("--static", "--heads", "8", "--window", "64", "--length", "512")[1])
    assert given == Case("bf16", 1, 512, 8, 128, 64, 2)


KERNELS = """
import json
import torch, triton, triton.language as tl
from dcscale.bench.attention.static.compilation import Compiler, versions
from dcscale.bench.attention.static.paths import Code
from dcscale.bench.attention.static.sass import products_with_a_in_registers

@triton.jit
def double(x_ptr, out_ptr, count, nothing, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    if tl.program_id(0) < count:
        for head in range(HEADS):
            tl.store(out_ptr + head * BLOCK + i, 2 * tl.load(x_ptr + head * BLOCK + i).to(tl.float32))

@triton.jit(do_not_specialize=["count"])
def multiply(x_ptr, out_ptr, count, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot((2 * x).to(tl.bfloat16), x))

x, out = torch.empty(1, dtype=torch.bfloat16, device="meta"), torch.empty(1, device="meta")
compiler = Compiler(90)
tensors = {"x_ptr": x, "out_ptr": out}
loop = compiler(double, {**tensors, "count": 32, "nothing": None}, {"HEADS": 1024, "BLOCK": 256}, 4, 1)
again = compiler(double, {**tensors, "count": 64, "nothing": None}, {"HEADS": 1024, "BLOCK": 256}, 4, 1)
short = compiler(double, {**tensors, "count": 32, "nothing": None}, {"HEADS": 2, "BLOCK": 256}, 4, 1)
code = Code(loop.sass)
product = compiler(multiply, {**tensors, "count": 1}, {"SIZE": 64}, 4, 1)
print(json.dumps({
    "loop": {name: getattr(loop, name) for name in ("registers", "spilled", "shared", "warps")},
    "same": loop is again,
    "trips": [each.trips for each in code.loops.values()],
    "unrolled": Code(short.sass).paths(1).interior.counts,
    "paths": {name: path.counts for name, path in code.paths(1)._asdict().items()},
    "product": products_with_a_in_registers(product.sass),
    "versions": versions(),
}))
"""


def test_kernels_are_compiled_and_counted_without_a_gpu(tmp_path):
    """In another process, because this one may use Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    (tmp_path / "kernels.py").write_text(KERNELS)
    done = subprocess.run([sys.executable, tmp_path / "kernels.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"]
    assert 8 <= found["loop"]["registers"] < 64
    assert (found["loop"]["spilled"], found["loop"]["shared"], found["loop"]["warps"]) == (0, 0, 4)
    # 1024 heads, in whatever loop: 2 elements a thread are one load and one store.
    interior, unseen = found["paths"]["interior"], found["paths"]["unseen"]
    assert (interior["load"], interior["store"]) == (1024, 1024)
    assert found["trips"] != []
    assert None not in found["trips"]
    assert found["unrolled"]["load"] == 2
    assert "load" not in unseen
    assert "other" not in interior
    assert found["product"] != []  # the compiler keeps the doubled operand in registers
    assert {"triton", "ptxas"} == found["versions"].keys()
