"""``tools/bench_attention.py --static``: options, cases, the run, and its result."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcscale.cli import print_tables
from dcscale.files import read_json

# What imports torch or triton is imported in the functions, after the arguments are parsed.
if TYPE_CHECKING:
    from dcscale.bench.attention.cases import Case
    from dcscale.bench.attention.static.compilation import Binary, Compiler
    from dcscale.bench.attention.static.cost import Rates
    from dcscale.bench.attention.static.plan import Clock

SHAPES = ((32, 128), (32, 80), (16, 64))
"""Heads and head dims, if neither is given."""
LENGTH, DTYPE = 4096, "bf16"
MODELLED_ARCH = 90
"""The compute capability that the model's rates are for; they are for 16-bit input, too."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options of --static."""
    group = parser.add_argument_group("static model: cost by the compiled code, without a GPU")
    group.add_argument("--static", action="store_true", help="compile the Triton kernels, count, and model their time")
    group.add_argument(
        "--arch",
        type=int,
        nargs="+",
        choices=(80, 90, 100),
        help=f"compute capabilities to compile for (default {MODELLED_ARCH}; times are modelled for that only)",
    )
    group.add_argument(
        "--add",
        action="store_true",
        help="keep what the --output holds, of other versions of Triton, capabilities or shapes",
    )
    group.add_argument(
        "--before", type=Path, metavar="FILE.json", help="with --markdown: an earlier static result to show next to it"
    )
    group.add_argument(
        "--assume", nargs="+", metavar="NAME=VALUE", help="replace assumptions of the model, which it prints"
    )


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits through ``parser.error`` if options contradict each other."""
    for name in ("arch", "add", "assume", "before"):
        if getattr(options, name) and not options.static:
            parser.error(f"--{name}: is an option of --static; add --static")
    if options.add and options.output is None:
        parser.error("--add: needs the result to add to; give --output")


def run(parser: argparse.ArgumentParser, options: argparse.Namespace, show: Callable[[str], Any]) -> dict[str, Any]:
    """Compile and model all calls that the options ask for; show them and return the result as JSON.

    Exits through ``parser.error`` if that is not possible.
    """
    if importlib.util.find_spec("triton") is None:
        parser.error("--static: triton is not installed (pip install triton)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("--static: TRITON_INTERPRET=1 is set, with which nothing can be compiled; unset it")
    import torch

    from dcscale.bench.attention.static.compilation import Compiler, versions
    from dcscale.bench.attention.static.cost import Rates, override
    from dcscale.bench.attention.static.report import MODEL, assumption_lines, lines
    from dcscale.bench.meter import gpu_clock

    try:
        rates = override(Rates(), options.assume or ())
    except ValueError as error:
        parser.error(f"--assume {error}")
    calls = _earlier_calls(parser, options.output) if options.add else []
    show("\n".join(assumption_lines(rates)))
    for arch in options.arch or (MODELLED_ARCH,):
        compiler = Compiler(arch)
        here = torch.cuda.is_available() and torch.cuda.get_device_capability() == divmod(arch, 10)
        timed = ("cuda", gpu_clock()) if here else None
        for case in cases(options):
            calls.append({"versions": versions(), **model_case(case, compiler, rates, timed)})
            show("\n" + "\n".join(lines(calls[-1])))
    return {"what": MODEL, "assumptions": rates.describe(), "calls": calls}


def _earlier_calls(parser: argparse.ArgumentParser, path: Path) -> list[dict[str, Any]]:
    try:
        return read_json(path)["calls"]
    except (ValueError, KeyError) as error:
        parser.error(f"--add: {path} is not a static result: {type(error).__name__} {error}")


def model_case(case: Case, compiler: Compiler, rates: Rates, timed: tuple[str, Clock] | None = None) -> dict[str, Any]:
    """The model of one case, next to measured times if a device and a clock to time its launches with are given.

    The result of :func:`dcscale.bench.attention.static.report.call_result` and, with times, "kept": the sums if forward
    keeps what backward needs, and the scratch memory that this takes.
    """
    from dcscale.bench.attention.static.plan import Planned, make_call, plan, time_launches, with_room_to_keep
    from dcscale.bench.attention.static.report import add_measured, call_result
    from dcscale.ops.masks import visible_pairs

    memory, arch = int(rates.memory * 1e9), compiler.arch
    pairs, all_pairs = (visible_pairs(case.length, window) for window in (case.window, None))
    modelled = rates if arch == MODELLED_ARCH and case.dtype != "fp32" else None

    def compiled(planned: Planned) -> Binary | None:
        launch = planned.launch
        if launch is None:
            return None
        return compiler(launch.kernel, launch.arguments, launch.constants, launch.warps, launch.stages)

    def result_of(planned: list[Planned]) -> dict[str, Any]:
        kernels = [(each.work, compiled(each)) for each in planned]
        visible = case.batch * case.heads * pairs
        return call_result(kernels, asdict(case), arch, visible, pairs / all_pairs, modelled)

    call = make_call(case, memory)
    result = result_of(plan(call, arch))
    if modelled is not None:
        roomy = with_room_to_keep(call, arch)
        kept = {"scratch_mib": roomy.scratch_bytes >> 20, "by_default": roomy is call}
        result["kept"] = kept | {"sums": result_of(plan(roomy, arch, keep=True))["sums"]}
    if timed is not None and modelled is not None:
        device, clock = timed
        add_measured(result, time_launches(make_call(case, memory, device), clock), rates)
    return result


def print_markdown(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Prints the table of an earlier static result, next to one from before it if --before is given."""
    from dcscale.bench.attention.static.report import markdown

    def table(result: dict[str, Any]) -> str:
        before = None if options.before is None else read_json(options.before)
        return markdown(result, before)

    print_tables(parser, options.markdown, table)


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """The calls that the options ask for."""
    from dcscale.bench.attention.cases import Case

    given = options.heads or options.head_dim
    shapes = product(options.heads or [32], options.head_dim or [128]) if given else SHAPES
    for dtype, length, (heads, head_dim), window in product(
        options.dtype or [DTYPE], options.length or [LENGTH], list(shapes), options.window or [None, 256]
    ):
        yield Case(dtype, options.batch, length, heads, head_dim, window, options.rank)
