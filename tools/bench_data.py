"""Compares the data path with other libraries, on the same data and in one run.

    python tools/bench_data.py                     # rates and costs: under ten minutes
    python tools/bench_data.py --quick             # under two minutes
    python tools/bench_data.py --elastic --faults  # what other ranks and workers, or a defect, do to each library
    python tools/bench_data.py --kinds dcscale litdata --workers 0 1 2 4 --tokens 100_000_000
    python tools/bench_data.py --markdown tools/results/data-intel-xeon-processor.json

Random documents are written once in every format. Each reading is a process of its own: it compares the tokens of one
epoch with the data, and times the next three; a reader that returns other tokens is reported and not timed. Readers
take turns. Files are in the page cache, so the software is measured and not the disk; the web server is on this machine
and waits 50 ms before each answer. Other libraries (pip install 'dcscale[bench]') are left out if they are not
installed. The readers, for --kinds:

"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dcscale.bench.data import KINDS
from dcscale.cli import check_output, print_tables, whole_number, whole_number_from_0
from dcscale.files import write_json

# What imports torch or numpy is imported in the functions, after the arguments are parsed: it takes seconds.

RESULTS = Path(__file__).parent / "results"
TIMED = ("dcscale", "dcscale-documents", "webdataset", "webdataset-bundles", "flat", "litdata", "mosaic")
SHARDS, BATCH, SLOTS, SHUFFLE_SHARDS = 32, 16, 4, 2
MINUTES = {"full": 6.0, "quick": 1.0}
"""No round of rates starts after this time."""

Say = Callable[[str], None]


class Sizes(NamedTuple):
    """Sizes of the measurements that have no option."""

    epochs: int = 3
    """Epochs that each reading times."""

    latency: float = 0.05
    """Seconds that the web server waits before each response."""

    memory_shards: int = 48
    """Shards of a million tokens each to measure memory with: large compared with what a process needs anyway."""

    order_shards: int = 1024
    """Shards whose order is compared."""

    planned_shards: int = 1_000_000
    """Shards of the very large epoch whose planning is timed."""


DEFAULT_SIZES = Sizes()


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    description = __doc__ + "\n".join(f"    {name:20} {kind.meaning}" for name, kind in KINDS.items())
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, metavar="KIND", help="default: all that support the measurement"
    )
    parser.add_argument(
        "--tokens", type=whole_number, help="tokens of the data, rounded (default 16,777,216; --quick a quarter)"
    )
    parser.add_argument("--sequence-length", type=whole_number, default=1024, metavar="L", help="default 1024")
    parser.add_argument("--workers", type=whole_number_from_0, nargs="+", metavar="W", help="default: 0 2")
    parser.add_argument("--rounds", type=whole_number, help="readings per reader (default 3, or 1 with --quick)")
    parser.add_argument("--quick", action="store_true", help="less data, fewer rounds")
    parser.add_argument("--elastic", action="store_true", help="instead: resume with other ranks and workers")
    parser.add_argument("--faults", action="store_true", help="instead: defects of a shard")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="default: tools/results/data-PROCESSOR.json")
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="print a result's tables, and exit")
    options = parser.parse_args(arguments)
    options.tokens = options.tokens or (1 << 22 if options.quick else 1 << 24)
    options.rounds = options.rounds or (1 if options.quick else 3)
    options.workers = [0, 2] if options.workers is None else options.workers
    check_output(parser, options.output)
    return parser, options


def main(arguments: list[str] | None = None, sizes: Sizes = DEFAULT_SIZES) -> int:
    parser, options = parse(arguments)
    from dcscale.bench.data import report
    from dcscale.provenance import facts, slug

    if options.markdown is not None:
        print_tables(parser, options.markdown, report.markdown)
        return 0

    def say(line: str) -> None:
        print(line, flush=True)

    command = ["python", "tools/bench_data.py", *(sys.argv[1:] if arguments is None else arguments)]
    libraries = sorted({kind.library for kind in KINDS.values() if kind.library})
    result = facts(command, "cpu", [*libraries, "numpy"])
    say(f"{result['machine']['name']}, {result['machine']['cores']} cores, load {result['machine']['load_average']}")
    started = time.monotonic()
    if options.elastic:
        result["elastic"] = run_elastic(options, say)
    if options.faults:
        result["faults"] = run_faults(options, say)
    if not options.elastic and not options.faults:
        result |= run_figures(options, sizes, say)
        result["targets"] = report.judge(result)
    result["seconds"] = round(time.monotonic() - started)
    say(report.markdown(result))
    checks = "-".join(name for name in ("elastic", "faults") if getattr(options, name))
    name = "-".join(filter(None, ["data", checks, slug("cpu"), "quick" if options.quick else ""]))
    path = options.output or RESULTS / f"{name}.json"
    write_json(path, result)
    say(f"written to {path} after {result['seconds']} s")
    wrong = [row for row in result.get("rates", ()) if (row["not_measured"] or "").startswith("wrong")]
    return 1 if wrong else 0


def run_figures(options: argparse.Namespace, sizes: Sizes, say: Say) -> dict[str, Any]:
    """Rates, costs and orders: everything but the checks."""
    import numpy as np

    from dcscale.bench.data import probe, rates
    from dcscale.bench.data.corpus import make_corpus
    from dcscale.bench.data.order import compare_orders
    from dcscale.bench.data.probe import written
    from dcscale.bench.data.reader import Settings, missing

    kinds = options.kinds or TIMED
    absent = missing(kinds)
    step = BATCH * options.sequence_length
    corpus = make_corpus(SHARDS, max(1, round(options.tokens / SHARDS / step)) * step, options.sequence_length)
    settings = {"length": options.sequence_length, "batch": BATCH, "slots": SLOTS, "shuffle_shards": SHUFFLE_SHARDS}
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        root = Path(temporary)
        histogram = root / "histogram.npy"
        np.save(histogram, corpus.histogram())
        folders = {}
        for kind in [kind for kind in kinds if kind not in absent]:
            folders[kind] = written(kind, corpus, root)
            say(f"  written for {kind}")
        with rates.serve(root, sizes.latency) as server:
            over_http = [0] if options.quick else options.workers
            cases = rates.cases(folders, server, root, options.workers, over_http, **settings)
            deadline = time.monotonic() + 60 * MINUTES["quick" if options.quick else "full"]
            rows = rates.measure(cases, histogram, options.rounds, sizes.epochs, deadline, say)
            rows += [rates.absent_row(kind, why) for kind, why in absent.items()]
            result: dict[str, Any] = {
                "tokens": corpus.tokens_ST.size,
                "documents": sum(map(len, corpus.ends)),
                **settings,
                "rates": rows,
            }
            if "dcscale" in folders:
                reader_settings = Settings(str(folders["dcscale"]), **settings)
                address = f"{server.address}/{folders['dcscale'].name}"
                result["amplification"] = rates.amplification(address, server, reader_settings, options.workers)
                shapes = [(1, 1), (4, 2)] if options.quick else [(1, 1), (4, 2), (4, 4)]
                large, small = (
                    written("dcscale", make_corpus(sizes.memory_shards, tokens, 1 << 10), root / name)
                    for name, tokens in (("large", 1 << 20), ("small", 1 << 14))
                )
                result["memory"] = rates.memory(large, small, Settings("", 1 << 10, BATCH), shapes)
        at, times = ([0.5], 1) if options.quick else ([0.1, 0.5, 0.9], 3)
        epoch = corpus.tokens_ST.size // step
        result["restarts"] = rates.restarts(folders, Settings("", **settings), epoch, at, times)
        result["plan"] = probe.run("plan", "dcscale", Settings("", **settings), shards=sizes.planned_shards)
    say("  costs are done")
    result["orders"] = compare_orders(sizes.order_shards)
    return result


def run_elastic(options: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """How each library resumes with other ranks and workers."""
    from dcscale.bench.data import elastic
    from dcscale.bench.data.reader import missing

    rows = []
    kinds = [kind for kind in options.kinds or elastic.KINDS if kind in elastic.KINDS]
    absent = missing(kinds)
    for kind in kinds:
        if kind in absent:
            cells = [elastic.cell(kind, elastic.BEFORE, after) for after in elastic.AFTER]
            rows += [cell | {"outcome": "not run", "error": absent[kind]} for cell in cells]
            continue
        with tempfile.TemporaryDirectory(prefix="bench-data-") as folder:
            rows += elastic.check(kind, Path(folder), say)
    return rows


def run_faults(options: argparse.Namespace, say: Say) -> list[dict[str, Any]]:
    """What each library does with a defect of a shard."""
    from dcscale.bench.data import faults
    from dcscale.bench.data.reader import missing

    rows = []
    kinds = [kind for kind in options.kinds or faults.KINDS if kind in faults.KINDS]
    absent = missing(kinds)
    for kind in kinds:
        if kind in absent:
            cells = [{"kind": kind, "defect": defect} for defect in faults.DEFECTS]
            rows += [cell | {"outcome": "not run", "error": absent[kind]} for cell in cells]
        else:
            rows += faults.check(kind, say)
    return rows


if __name__ == "__main__":
    sys.exit(main())
