"""What follows from the times of a run: goodput by checkpoint interval, failure rate and fault; its tables and plot."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dcscale.bench.goodput.simulate import (
    ARRIVALS,
    DAY,
    Times,
    best_interval,
    daly_interval,
    expected_goodput,
    simulate,
    young_interval,
)
from dcscale.bench.goodput.times import Fault, MeasuredRun, Values, repository_values, times_of
from dcscale.cli import ResultError
from dcscale.config.cluster import Failures
from dcscale.files import write_json

INTERVALS = (10.0, 20.0, 30.0, 60.0, 120.0, 180.0, 300.0, 600.0, 900.0, 1800.0, 3600.0)
"""Seconds of training between saves, of the table."""

MTBF_HOURS = (1.0, 3.0, 12.0, 24.0, 72.0, 168.0, 720.0)
"""Mean hours between failures, of the table: one hour to 30 days."""

TARGET = 0.95
"""Goodput that a day with a failure every 45 minutes should reach."""

RATE_FAILURES = 4
"""Mean number of failures of a simulated run of the table by failure rate, unless a day has more."""


def days(times: Times, interval: float, mtbf: float, arrivals: str, seeds: int, wall: float = DAY) -> dict[str, float]:
    """Mean, 5 % and 95 % quantile of the goodput of ``seeds`` simulated days, and the means of where the time went."""
    outcomes = [simulate(times, interval, ARRIVALS[arrivals](mtbf, seed), wall) for seed in range(seeds)]
    goodputs = sorted(outcome.goodput for outcome in outcomes)
    parts = {
        name: statistics.mean(getattr(outcome, name) for outcome in outcomes)
        for name in ("lost", "stalled", "slowed", "down", "planned", "failures", "checkpoints")
    }
    return {
        "goodput": statistics.mean(goodputs),
        "low": goodputs[round(0.05 * (seeds - 1))],
        "high": goodputs[round(0.95 * (seeds - 1))],
        **parts,
    }


def by_interval(times: Times, mtbf: float, seeds: int, shortest: float) -> dict[str, Any]:
    """Goodput of a day by checkpoint interval, with failures of both kinds, and the best interval.

    Args:
        times: the costs.
        mtbf: mean seconds between failures.
        seeds: days a row.
        shortest: the shortest interval that is possible, in seconds: a step.
    """
    best = best_interval(times, mtbf, shortest)
    named = {
        "best": best,
        "Young": max(shortest, young_interval(times, mtbf)),
        "Daly": max(shortest, daly_interval(times, mtbf)),
    }
    table = [("", interval) for interval in INTERVALS if interval >= shortest]
    rows: list[dict[str, Any]] = []
    for name, interval in sorted([*named.items(), *table], key=lambda row: row[1]):
        if rows and name and rows[-1]["name"] and interval < 1.01 * rows[-1]["interval"]:
            names = [*rows[-1]["name"].split(", "), name]
            rows[-1]["name"] = ", ".join(each for each in named if each in names)
            continue
        row: dict[str, Any] = {"name": name, "interval": interval}
        row["formula"] = expected_goodput(times, interval, mtbf)
        row |= {arrivals: days(times, interval, mtbf, arrivals, seeds) for arrivals in ARRIVALS}
        rows.append(row)
    simulated = max(rows, key=lambda row: row["exponential"]["goodput"])
    return {
        "mtbf": mtbf,
        "rows": rows,
        "best": best,
        "best_simulated": simulated["interval"],
        "target": TARGET,
        "longest_outage": longest_outage(times, mtbf, shortest, TARGET),
    }


def longest_outage(times: Times, mtbf: float, shortest: float, target: float) -> float | None:
    """The most seconds from a failure to the next first step with which the best interval reaches ``target``.

    None if it is not reached even without an outage.
    """

    def reaches(outage: float) -> bool:
        changed = replace(times, notice=0.0, restart=outage, time_limit=None)
        return expected_goodput(changed, best_interval(changed, mtbf, shortest), mtbf) >= target

    low, high = 0.0, mtbf
    if not reaches(low):
        return None
    while high - low > 0.1:
        middle = (low + high) / 2
        low, high = (middle, high) if reaches(middle) else (low, middle)
    return low


def by_rate(
    values_of: Callable[[int], Values], node_mtbf_hours: float, seeds: int, shortest: float
) -> list[dict[str, Any]]:
    """Best interval and goodput by failure rate, which is that of so many nodes.

    Args:
        values_of: the times of a run on a number of nodes.
        node_mtbf_hours: mean hours between the failures of one node.
        seeds: runs a row.
        shortest: the shortest interval that is possible, in seconds.
    """
    rows = []
    for hours in MTBF_HOURS:
        nodes, mtbf = max(1, round(node_mtbf_hours / hours)), 3600 * hours
        times = times_of(values_of(nodes))
        best, wall = best_interval(times, mtbf, shortest), max(DAY, RATE_FAILURES * mtbf)
        rows.append(
            {
                "mtbf_hours": hours,
                "nodes": nodes,
                "times": asdict(times),
                "interval": best,
                "formula": expected_goodput(times, best, mtbf),
                "young": expected_goodput(times, max(shortest, young_interval(times, mtbf)), mtbf),
                "young_interval": young_interval(times, mtbf),
                "wall": wall,
                "simulated": days(times, best, mtbf, "exponential", seeds, wall),
            }
        )
    return rows


def by_fault(faults: Sequence[Fault], values: Values, mtbf: float, seeds: int, shortest: float) -> list[dict[str, Any]]:
    """The same day if all failures were of one kind; ``values`` say what a checkpoint costs."""
    rows = []
    for fault in faults:
        alone = repository_values([fault])
        changed = times_of({**values, "notice": alone["notice"], "restart": alone["restart"]})
        best = best_interval(changed, mtbf, shortest)
        rows.append(
            {
                "fault": fault.title,
                "notice": changed.notice,
                "restart": changed.restart,
                "interval": best,
                "formula": expected_goodput(changed, best, mtbf),
                "simulated": days(changed, best, mtbf, "exponential", seeds),
            }
        )
    return rows


def compare(run: MeasuredRun, name: str, given: Values, seeds: int) -> dict[str, Any]:
    """The goodput of a real run next to that of simulated ones with its times and as many failures.

    Args:
        run: the run.
        name: its name.
        given: times that replace its own.
        seeds: runs to simulate.

    Returns:
        ``measured``: the run; ``compared``: its goodput (``real``), that of a simulated run with the same failures
        (``replayed``), of simulated runs with other failures at the same rate (``simulated``, as :func:`days`), and
        of an endless run (``formula``). ``compared`` is null if nothing failed.
    """
    times, compared = times_of(run.values(name, given)), None
    if run.failed_at:
        mtbf = run.wall / len(run.failed_at)
        compared = {
            "real": run.goodput,
            "replayed": simulate(times, run.interval, run.failed_at, run.wall).goodput,
            "simulated": days(times, run.interval, mtbf, "exponential", seeds, run.wall),
            "formula": expected_goodput(times, run.interval, mtbf),
            "mtbf": mtbf,
        }
    return {"name": name, "measured": run.as_json(), "compared": compared}


def study(
    values_of: Callable[[int], Values], nodes: int, failures: Failures, mtbf: float, seeds: int, shortest: float
) -> dict[str, Any]:
    """Times with their sources, goodput of a day by interval, and goodput by failure rate.

    Args:
        values_of: the times of a run on a number of nodes.
        nodes: those of the day.
        failures: of a node, for the table by failure rate.
        mtbf: mean seconds between failures of the day.
        seeds: simulated runs a row.
        shortest: the shortest interval that is possible, in seconds: a step.
    """
    values = values_of(nodes)
    return {
        "times": {name: asdict(value) for name, value in values.items()},
        "day": by_interval(times_of(values), mtbf, seeds, shortest),
        "rates": by_rate(values_of, failures.node_mtbf_hours, seeds, shortest),
        "failures": asdict(failures),
    }


# -- tables and plot, made from the JSON of a result -------------------------------------------------------------------


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as Markdown.

    Raises:
        ResultError: the JSON is not a result of goodput.
    """
    try:
        sections = [_times(result), *(part(result[key]) for key, part in _PARTS.items() if key in result)]
        return "\n\n".join("\n".join(lines) for lines in sections)
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise ResultError(f"it is not a result of goodput: {type(error).__name__} {error}") from error


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, with three significant digits."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _times(result: Mapping[str, Any]) -> list[str]:
    lines = [f"`{result['command']}`, {result['date'][:10]}, commit {result['commit']}", ""]
    lines += _head(["time", "", "from"])
    for name, value in result["times"].items():
        assumed = "**assumed**: " if value["assumed"] else ""
        shown = f"{value['seconds']:.3g}" if name == "slowdown" else duration(value["seconds"])
        lines.append(_line([name, shown, assumed + value["source"]]))
    return lines


def _day(day: Mapping[str, Any]) -> list[str]:
    exponential = next(row for row in day["rows"] if "best" in row["name"])["exponential"]
    reached = "reached" if exponential["goodput"] >= day["target"] else "**missed**"
    outage = day["longest_outage"]
    target = f"{100 * day['target']:g} %"
    limit = (
        f"no outage is short enough for {target}" if outage is None else f"{target} allows outages of {outage:.0f} s"
    )
    lines = [
        f"A day with a failure every {duration(day['mtbf'])} on average: mean of the days (5 to 95 % of them). At the",
        f"best interval, {duration(day['best'])}, goodput is {_percent(exponential['goodput'])}: {target} {reached}. "
        f"With this MTBF, {limit} (notice and restart).",
        "",
        *_head(["interval", "", "exponential", "fixed", "formula", "of the day lost", "stalled", "down"]),
    ]
    for row in day["rows"]:
        random, fixed = row["exponential"], row["fixed"]
        parts = [_percent(random[name] / 86_400) for name in ("lost", "stalled", "down")]
        spread = f"{_percent(random['goodput'])} ({_percent(random['low'])} to {_percent(random['high'])})"
        formula = _percent(row["formula"])
        lines.append(
            _line([duration(row["interval"]), row["name"], spread, _percent(fixed["goodput"]), formula, *parts])
        )
    return lines


def _rates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["a failure every", "nodes", "outage", "best interval", "simulated", "formula", "Young's", "formula"]
    lines = ["By failure rate, each at its best interval, and at Young's:", "", *_head(head)]
    for row in rows:
        hours = row["mtbf_hours"]
        every = f"{hours / 24:g} days" if hours >= 48 else f"{hours:g} h"
        cells = [every, row["nodes"], duration(row["times"]["notice"] + row["times"]["restart"])]
        cells += [duration(row["interval"]), _percent(row["simulated"]["goodput"]), _percent(row["formula"])]
        lines.append(_line([*cells, duration(row["young_interval"]), _percent(row["young"])]))
    return lines


def _faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["if all failures were", "notice", "restart", "best interval", "simulated", "formula"]
    lines = ["The same day by kind of fault:", "", *_head(head)]
    for row in rows:
        cells = [row["fault"], *(duration(row[name]) for name in ("notice", "restart", "interval"))]
        lines.append(_line([*cells, _percent(row["simulated"]["goodput"]), _percent(row["formula"])]))
    return lines


def _runs(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    head = ["run", "wall", "failures", "interval", "real", "same failures", "same rate", "formula"]
    lines = ["Goodput of real runs, and simulated with their times:", "", *_head(head)]
    for run in runs:
        real, found = run["measured"], run["compared"]
        cells = [run["name"], duration(real["wall"]), len(real["failed_at"]), f"{real['interval_steps']} steps"]
        if found is None:
            lines.append(_line([*cells, _percent(real["goodput"]), "-", "-", "-"]))
            continue
        simulated = found["simulated"]
        spread = f"{_percent(simulated['goodput'])} ({_percent(simulated['low'])} to {_percent(simulated['high'])})"
        lines.append(
            _line([*cells, _percent(found["real"]), _percent(found["replayed"]), spread, _percent(found["formula"])])
        )
    return lines


_PARTS = {"runs": _runs, "day": _day, "rates": _rates, "faults": _faults}


def _percent(part: float) -> str:
    return f"{100 * part:.2f} %"


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def save(result: Mapping[str, Any], path: Path) -> None:
    """Writes a result to ``path``, plots it next to that, and prints where they are."""
    write_json(path, result)
    print(f"written: {path}")
    try:
        plot(result, path.with_suffix(".png"))
        print(f"plotted: {path.with_suffix('.png')}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed (pip install -c launch/constraints.txt matplotlib)")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plots goodput over the checkpoint interval, and over the failure rate.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    day, rates = result["day"], result["rates"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    intervals = [row["interval"] for row in day["rows"]]
    for arrivals, colour in (("exponential", "tab:blue"), ("fixed", "tab:orange")):
        goodputs = [100 * row[arrivals]["goodput"] for row in day["rows"]]
        left.plot(intervals, goodputs, ".-", color=colour, label=f"{arrivals}: mean of the days")
    band = [[100 * row["exponential"][name] for row in day["rows"]] for name in ("low", "high")]
    left.fill_between(intervals, *band, alpha=0.2, color="tab:blue", label="exponential: 5 to 95 % of the days")
    left.plot(intervals, [100 * row["formula"] for row in day["rows"]], "k:", label="formula")
    for row, style in zip([row for row in day["rows"] if row["name"]], ("-", "--", ":")):
        label = f"{row['name']}: {duration(row['interval'])}"
        left.axvline(row["interval"], color="tab:gray", linestyle=style, linewidth=1, label=label)
    left.axhline(100 * day["target"], color="tab:red", linewidth=1, label=f"{100 * day['target']:g} %")
    left.set_xscale("log")
    ticks = [row["interval"] for row in day["rows"] if not row["name"]]
    left.set_xticks(ticks, [duration(tick).replace(" ", "\n") for tick in ticks], fontsize=7)
    left.minorticks_off()
    left.set_ylim(max(0, min(100 * row["exponential"]["low"] for row in day["rows"])) - 1, 100)
    left.set_xlabel("training between two checkpoints")
    left.set_ylabel("goodput, %")
    left.set_title(f"a failure every {duration(day['mtbf'])}", fontsize=10)
    left.legend(fontsize=7)
    hours = [row["mtbf_hours"] for row in rates]
    for key, style, name in (("formula", "k:", "best"), ("young", "--", "Young's")):
        right.plot(hours, [100 * row[key] for row in rates], style, label=f"formula, {name} interval")
    right.plot(hours, [100 * row["simulated"]["goodput"] for row in rates], ".-", label="simulated, best interval")
    right.set_xscale("log")
    right.set_xticks(hours, [f"{row['mtbf_hours']:g} h\n{row['nodes']:,}" for row in rates], fontsize=7)
    right.minorticks_off()
    right.set_xlabel("mean time between failures, and number of nodes")
    right.set_title("by failure rate", fontsize=10)
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.3)
    outage = sum(result["times"][name]["seconds"] for name in ("notice", "restart"))
    stall, durable = (duration(result["times"][name]["seconds"]) for name in ("stall", "durable"))
    title = f"stall {stall}, durable after {durable}, outage {duration(outage)}; {result['date'][:10]}"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
