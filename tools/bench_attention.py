"""Checks the errors of compose attention, then compares its speed with the dense formula and plain attention.

    python tools/bench_attention.py                      # a GPU: under ten minutes
    python tools/bench_attention.py --quick              # a CPU: under three minutes
    python tools/bench_attention.py --length 1024 8192 --window none 256 512 --kinds triton sdpa
    python tools/bench_attention.py --markdown tools/results/attention-nvidia-h100-80gb-hbm3.json
    python tools/bench_attention.py --static             # anywhere: compile the Triton kernels and model their time
    python tools/bench_attention.py --first-look         # a GPU: does that model hold, and what should change?

Every implementation is compared with float64 first; if one is wrong, nothing is timed and the exit code is 1. The
result is printed, written as JSON and plotted next to it. TFLOP/s count only the two matrix products over visible
pairs of query and key: 4 D per pair and head forward, and 2.5 times that backward. The implementations, for --kinds:

"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.bench.attention import DTYPE_NAMES, KINDS, PLAIN, first_look
from dcscale.bench.attention.static import tool as static
from dcscale.cli import check_output, print_tables, whole_number
from dcscale.files import write_json

# What imports torch is imported in the functions, after the arguments are parsed: it takes seconds.
if TYPE_CHECKING:
    from dcscale.bench.attention.cases import Case

RESULTS = Path(__file__).parent / "results"
MINUTES = {"cuda": 9.0, "cpu": 20.0, "quick": 2.5}
SECONDS = {"cuda": 3.0, "cpu": 10.0, "quick": 3.0}
"""Seconds that the timing of one case may take."""


def window_size(text: str) -> int | None:
    return None if text == "none" else whole_number(text)


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    description = __doc__ + "\n".join(f"    {kind:14} {meaning}" for kind, meaning in KINDS.items())
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPE_NAMES, help="default: bf16 on a GPU, fp32 and bf16 on a CPU"
    )
    parser.add_argument("--batch", type=whole_number, default=1, metavar="B", help="sequences per call (default 1)")
    parser.add_argument(
        "--length", type=whole_number, nargs="+", metavar="T", help="default: 1024 to 32768; CPU: to 4096"
    )
    parser.add_argument("--heads", type=whole_number, nargs="+", metavar="H", help="default: 32 and 16; CPU: 16")
    parser.add_argument(
        "--head-dim", type=whole_number, nargs="+", metavar="D", help="default: 128, 64 and 80; CPU: 64"
    )
    parser.add_argument("--window", type=window_size, nargs="+", metavar="W", help="keys, or none (default: none 256)")
    parser.add_argument("--rank", type=whole_number, default=2, metavar="R", help="of the compose weights (default 2)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, metavar="KIND", help="default: all, as far as time allows")
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds")
    parser.add_argument(
        "--minutes", type=float, help="start nothing after this time (default: GPU 9, CPU 20, --quick 2.5)"
    )
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)  # for tests: the time of one case
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: tools/results/attention-DEVICE.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="print a result for the README, and exit")
    first_look.add_options(parser)
    static.add_options(parser)
    options = parser.parse_args(arguments)
    static.check_options(parser, options)
    first_look.check_options(parser, options)

    import torch

    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no NVIDIA GPU here; use --device cpu")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes {options.minutes}: must be above 0")
    check_output(parser, options.output, "; the plot is written next to it as .png")
    return parser, options


def main(arguments: list[str] | None = None) -> int:
    parser, options = parse(arguments)
    from dcscale.bench.attention.measure import WrongResultsError, run_all
    from dcscale.bench.attention.report import judge, markdown, save, target_lines
    from dcscale.provenance import facts

    if options.markdown is not None:
        if options.static:
            static.print_markdown(parser, options)
        else:
            print_tables(parser, options.markdown, markdown)
        return 0

    mode = "quick" if options.quick else options.device
    command = ["python", "tools/bench_attention.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = facts(command, options.device, ("triton", *PLAIN[1:]))
    say = partial(print, flush=True)
    if options.first_look:
        return first_look.run(parser, options, result, output(options), say)
    if options.static:
        result |= static.run(parser, options, say)
        if options.output is not None:
            write_json(options.output, result)
            print(f"written: {options.output}")
        return 0
    machine = result["machine"]
    print(f"{machine['name']}, {machine['threads']} threads, load {machine['load_average']}")
    started = time.monotonic()
    try:
        limits = options.seconds or SECONDS[mode], options.minutes or MINUTES[mode]
        errors, rows = run_all(*plan(options), options.device, *limits, say)
    except WrongResultsError as error:
        print(error, file=sys.stderr)
        return 1
    targets = judge(rows, machine)
    print("targets", *target_lines(targets), sep="\n")
    result |= {"seconds": round(time.monotonic() - started), "errors": errors, "targets": targets, "rows": rows}
    save(result, output(options))
    return 0


def plan(options: argparse.Namespace) -> tuple[list[Case], Callable[[Case], dict[str, str | None]]]:
    """(the cases, a function from a case to {kind: why it is left out, or None})."""
    from dcscale.bench.attention.cases import make_cases, too_slow

    cases = make_cases(
        options.device,
        dtypes=options.dtype,
        batch=options.batch,
        lengths=options.length,
        heads=options.heads,
        head_dims=options.head_dim,
        windows=options.window,
        rank=options.rank,
        quick=options.quick,
    )
    if options.kinds:
        return cases, lambda case: dict.fromkeys(options.kinds)
    return cases, lambda case: {kind: too_slow(kind, case, cases[0], options.device, options.quick) for kind in KINDS}


def output(options: argparse.Namespace) -> Path:
    """The file to write, by default named after the device."""
    from dcscale.provenance import slug

    name = "first-look" if options.first_look else "attention"
    return options.output or RESULTS / f"{name}-{slug(options.device)}{'-quick' if options.quick else ''}.json"


if __name__ == "__main__":
    # An empty cache: with what earlier runs have compiled, compile times would mean nothing.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        sys.exit(main())
