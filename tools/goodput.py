"""Goodput of a run with failures (useful training time / wall-clock time), and its best checkpoint interval.

    python tools/goodput.py                                  # times measured in this repository, a failure each 45 min
    python tools/goodput.py --restart 300 --mtbf 8h          # what other times would change
    python tools/goodput.py --cluster configs/cluster/8xh100-infiniband.yaml --nodes 8 --parameters 2.8e9
    python tools/goodput.py --from runs/NAME [runs/OTHER]    # times of a real run, and its real goodput next to it
    python tools/goodput.py --live 8 CONFIG.yaml key=value   # trains 8 minutes, kills ranks at random, then --from
    python tools/goodput.py --markdown tools/results/goodput.json

Simulates days event by event: a save stops training for --stall, and the checkpoint is complete --durable after the
save began; a failure loses what was trained since the newest complete one, and the run trains again --notice and
--restart later (dcscale/bench/goodput/simulate.py). The formula is exact for exponentially distributed failures and an
endless run. Each time is printed with its source; those that were not measured are marked as assumed.

Durations are in seconds, or with a unit: 90, 45min, 8h, 30d. --live needs nothing but the config: two ranks of this
machine, killed by SIGKILL, started again while their exit codes say so (75, 76). It writes the times of kills and exits
into RUN/kills.json, which --from reads.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dcscale.cli import check_output, positive_number, print_tables, whole_number, whole_number_from_0

# What imports torch or YAML is imported in the functions, after the arguments are parsed: it takes seconds.

ROOT = Path(__file__).resolve().parents[1]
UNITS = {"s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
TIMES = {
    "stall": "training waits so long for each checkpoint",
    "durable": "from the beginning of a save to the complete checkpoint",
    "notice": "from a failure to the end of all ranks",
    "restart": "from there to the first step of the next start",
    "time_limit": "a start is stopped after so long, with a checkpoint (default: never)",
}


def duration(text: str) -> float:
    """Type of an option that is a duration of 0 or more, in seconds."""
    number, unit = next(((text.removesuffix(u), u) for u in ("min", "h", "d", "s") if text.endswith(u)), (text, "s"))
    try:
        seconds = float(number) * UNITS[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} must be a duration of 0 or more, such as 90, 45min, 8h or 30d")
    return seconds


def parse(arguments: list[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="CONFIG.yaml|key=value", help="with --live: the run")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--from", dest="runs", type=Path, nargs="+", default=[], metavar="RUN", help="run folders")
    source.add_argument("--live", type=positive_number, metavar="MINUTES", help="train and kill for so long")
    source.add_argument("--cluster", type=Path, metavar="FILE.yaml", help="derive the times from a cluster")
    parser.add_argument("--nodes", type=whole_number, metavar="N", help="with --cluster (default: 8, or all if fewer)")
    parser.add_argument("--parameters", type=positive_number, default=2.8e9, help="with --cluster (default 2.8e9)")
    parser.add_argument("--mtbf", type=duration, default=2700.0, help="mean time between failures (default 45min)")
    parser.add_argument("--kill-every", type=duration, default=75.0, help="with --live: mean of kills (default 75 s)")
    parser.add_argument("--ranks", type=whole_number, default=2, metavar="N", help="with --live (default 2)")
    for name, meaning in TIMES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=duration, metavar="TIME", help=meaning)
    parser.add_argument("--slowdown", type=float, metavar="PART", help="of the speed, while a checkpoint is written")
    parser.add_argument("--step", type=duration, default=1.0, help="shortest possible interval (default 1 s)")
    parser.add_argument("--seeds", type=whole_number, default=50, metavar="N", help="simulated days (default 50)")
    parser.add_argument("--seed", type=whole_number_from_0, default=0, help="with --live, of the kills (default 0)")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the result, and a plot next to it")
    parser.add_argument("--markdown", type=Path, metavar="FILE.json", help="print the tables of a result, and exit")
    options = parser.parse_args(arguments)
    check_output(parser, options.output)
    if options.settings and options.live is None:
        parser.error(f"{options.settings[0]}: settings are for --live only; a run folder is given with --from")
    if options.nodes is not None and options.cluster is None:
        parser.error("--nodes: give --cluster, such as configs/cluster/8xh100-infiniband.yaml")
    if options.live is not None and not options.settings:
        parser.error("--live: give a config, such as configs/quickstart.yaml")
    for name, least in (("mtbf", 60.0), ("kill_every", 1.0), ("step", 0.1)):  # below that it would take minutes
        if getattr(options, name) < least:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name):g} s: it must be at least {least:g} s")
    return parser, options


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """The result as JSON. Raises ValueError if times, runs or the cluster cannot be used."""
    from dcscale.bench.goodput import study, times
    from dcscale.config.cluster import load_cluster
    from dcscale.hardware import PEAK_TFLOPS_BF16

    names = [*TIMES, "slowdown"]
    given = {name: times.Value(v, "command line") for name in names if (v := getattr(options, name)) is not None}
    cluster = load_cluster(options.cluster or ROOT / "configs/cluster/8xh100-infiniband.yaml", PEAK_TFLOPS_BF16)
    nodes = options.nodes or min(8, cluster.nodes)
    if nodes > cluster.nodes:
        raise ValueError(f"--nodes {nodes}: {options.cluster} has nodes: {cluster.nodes}; change it there")
    runs = {str(path): times.measure_run(path) for path in options.runs}
    faults = [] if runs or {"notice", "restart"} <= set(given) else times.campaign_faults(ROOT / "launch/README.md")

    def values_of(nodes: int) -> times.Values:
        if runs:
            (name, run), *_ = runs.items()
            return run.values(name, given)
        known = {**times.repository_values(faults), **given}
        if options.cluster is None:
            return known
        many = nodes if cluster.storage.shared else 1  # the table by failure rate asks for more nodes than there are
        return {**times.cluster_values(cluster, many, options.parameters, known["notice"]), **given}

    result = study.study(values_of, nodes, cluster.failures, options.mtbf, options.seeds, options.step)
    if runs:
        result["runs"] = [study.compare(run, name, given, options.seeds) for name, run in runs.items()]
    elif options.cluster is None and faults:
        result["faults"] = study.by_fault(faults, values_of(1), options.mtbf, options.seeds, options.step)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser, options = parse(arguments)
    from dcscale.bench.goodput import study

    if options.markdown is not None:
        print_tables(parser, options.markdown, study.markdown)
        return 0
    try:
        if options.live is not None:
            from dcscale.bench.goodput.live import train_live

            chosen = (options.live, options.kill_every, options.ranks, options.seed)
            options.runs = [train_live(ROOT / "launch/train.py", options.settings, *chosen)]
        result = measure(options)
    except (ValueError, RuntimeError, OSError, KeyboardInterrupt) as error:
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else 2
    from dcscale.provenance import facts

    command = ["python", "tools/goodput.py", *(sys.argv[1:] if arguments is None else arguments)]
    result = {**facts(command, "cpu"), **result}
    print(study.markdown(result))
    if options.output is not None:
        study.save(result, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
