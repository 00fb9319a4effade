"""Reports of a result, all made from its JSON: tables for the screen and the README, the targets, and the plot.

matplotlib is imported only when a plot is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcscale.bench.attention import KINDS, PLAIN
from dcscale.bench.attention.cases import PASSES, TARGET_SHAPE, Case, Row
from dcscale.cli import ResultError, short
from dcscale.files import write_json

_CASE = tuple(Case.__dataclass_fields__)
_TABLE_KINDS = {**{kind: (kind,) for kind in KINDS if kind not in PLAIN}, "plain": PLAIN}
"""Columns of the Markdown table, each with the kinds of which it shows the fastest."""
_COLUMNS = ("", "forward ms", "fwd+bwd ms", "quartiles", "x plain", "x windowed", "TFLOP/s", "peak MiB", "")
LEGEND = (
    "of two figures in a cell, the first is forward, the second forward+backward; x plain: time relative to the\n"
    "fastest plain attention without a window, marked *; x windowed: relative to dcscale.ops.attention;\n"
    "peak MiB: above the inputs"
)
NOT_MEASURED = "not measured"


def case_lines(rows: Sequence[Row]) -> list[str]:
    """The table of one case, with the implementations that were measured."""
    cells = [_COLUMNS]
    for row in rows:
        if row["not_measured"] is not None:
            continue
        forward, both = (row[each] for each in PASSES)
        low, high = both["quartiles_ms"]
        notes = [row["note"]] if row["note"] else []
        if "compile_seconds" in row:
            notes.append(f"compiled in {row['compile_seconds']:.1f} s")
        cells.append(
            (
                row["implementation"] + (" *" if row["implementation"] == row.get("times_plain", {}).get("of") else ""),
                f"{forward['ms']:.2f}",
                f"{both['ms']:.2f}",
                f"{low:.2f}-{high:.2f}",
                _ratios(row, "times_plain"),
                _ratios(row, "times_windowed"),
                f"{short(forward['tflops'])} {short(both['tflops'])}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                "; ".join(notes),
            )
        )
    # Names and notes are aligned to the left, figures to the right.
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = []
    for first, *others, last in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return ["  " + line for line in lines]


def missing_lines(rows: Sequence[Row]) -> list[str]:
    """A line for each implementation that was not measured, with the reason."""
    return [f"  {row['implementation']}: {NOT_MEASURED}: {row['not_measured']}" for row in rows if row["not_measured"]]


def target_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each target, from the result of :func:`judge`."""
    lines = []
    for each in verdicts:
        ratio = "" if each["ratio"] is None else f"{short(each['ratio'])} x, "
        lines.append(f"  {each['verdict']:12}  {each['target']}: {ratio}{each['detail']}")
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """Format a result as Markdown: where it was measured, forward+backward of every case, and the targets.

    Raises:
        ResultError: the JSON is not a result of bench_attention.
    """
    try:
        return "\n".join([*_origin(result), "", *_table(result["rows"]), "", *_targets(result["targets"])])
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ResultError(f"it is not a result of bench_attention: {type(error).__name__} {error}") from error


def _origin(result: Mapping[str, Any]) -> list[str]:
    machine, versions = result["machine"], result["versions"]
    place = machine["name"] if machine["device"] == "cuda" else f"{machine['threads']} threads of an {machine['name']}"
    names = [f"{name} {versions[name]}" for name in ("torch", "triton", "cuda", "python") if versions[name] is not None]
    return [
        f"{place}; {', '.join(names)}; {result['date'][:10]}, commit {result['commit']}; `{result['command']}`",
        "",
        "Forward and backward: median of a call in ms, relative to the fastest plain attention without a window in",
        "the same case (x), and peak memory above the inputs.",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in _CASE), []).append(row)
    lines = _head(["type", "B", "T", "H", "D", "window", *_TABLE_KINDS])
    for (dtype, batch, length, heads, head_dim, window, _), of_case in cases.items():
        cells = [dtype, batch, length, heads, head_dim, "-" if window is None else window]
        for column, kinds in _TABLE_KINDS.items():
            timed = [row for row in of_case if row["not_measured"] is None and row["kind"] in kinds]
            best = min(timed, key=lambda row: row["forward_backward"]["ms"], default=None)
            if best is None:
                cells.append("-" if column == "windowed" and window is None else NOT_MEASURED)
                continue
            if column == "plain":
                name, ratio = f" ({best['implementation']})", ""
            else:
                name, ratio = "", f" ({short(best['times_plain'][PASSES[1]])}x)" if "times_plain" in best else ""
            memory = f"{best['peak_bytes'] / 2**20:,.0f} MiB"
            cells.append(f"{short(best['forward_backward']['ms'])} ms{name}{ratio}, {memory}")
        lines.append(_line(cells))
    return lines


def _targets(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = _head(["target", "measured", ""])
    for each in verdicts:
        measured = NOT_MEASURED if each["ratio"] is None else f"{short(each['ratio'])} x: {each['detail']}"
        lines.append(_line([each["target"], measured, each["detail"] if each["ratio"] is None else each["verdict"]]))
    return lines


def _head(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def _ratios(row: Row, name: str) -> str:
    return " ".join(short(row[name][each]) for each in PASSES) if name in row else "-"


THREADS_ON_CPU = 2
"""Threads that the targets of times on a CPU are stated for."""


@dataclass(frozen=True)
class Target:
    """``kind`` takes at most ``limit`` times as much as ``baseline``, with TARGET_SHAPE's heads, B=1 and rank 2."""

    device: str
    kind: str
    limit: float
    measure: str
    """"time" of forward and backward, or "peak memory"."""
    baseline: str
    """A kind, of which the best implementation counts; or "growth": ``kind`` itself at ``baseline_length``."""
    dtype: str
    window: int | None = None
    length: int = 4096
    baseline_length: int = 4096

    def __str__(self) -> str:
        _, heads, head_dim = TARGET_SHAPE[self.device]
        window = "no window" if self.window is None else f"window {self.window}"
        place = f"{self.dtype}, T={self.length}, H={heads}, D={head_dim}, {window}"
        what = self.measure if self.measure != "time" else "forward+backward"
        baseline = {
            "dense": "the dense formula's",
            "dense-compiled": "the compiled dense formula's",
            "plain": "plain attention's without a window",
            "growth": f"that at T={self.baseline_length}",
        }[self.baseline]
        device = {"cuda": "GPU", "cpu": "CPU"}[self.device]
        return f"{device}: {self.kind}, {what} at most {_number(self.limit)} x {baseline} ({place})"


TARGETS = (
    Target("cuda", "triton", 3, "time", "plain", "bf16"),
    Target("cuda", "triton", 1, "time", "plain", "bf16", window=256),
    Target("cuda", "triton", 1 / 3, "time", "dense-compiled", "bf16"),
    Target("cuda", "triton", 1 / 10, "time", "dense", "bf16"),
    Target("cuda", "triton", 1 / 8, "peak memory", "dense", "bf16"),
    *(
        Target("cpu", kind, limit, "time", "plain", dtype, window)
        for kind in ("chunked", "compiled")
        for dtype in ("fp32", "bf16")
        for window, limit in ((None, 3), (256, 1))
    ),
    # From T=1024 to 4096 anything of size T x S grows by 16.
    *(
        Target("cpu", kind, 4, "peak memory", "growth", dtype, window, baseline_length=1024)
        for kind in ("chunked", "compiled")
        for dtype in ("fp32", "bf16")
        for window in (None, 256)
    ),
)


def judge(rows: Sequence[Row], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, each with the measured ratio and the verdict "reached", "missed" or "not measured"."""
    return [{"target": str(target), "limit": target.limit, **_verdict(target, rows, machine)} for target in TARGETS]


def _verdict(target: Target, rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, Any]:
    if machine["device"] != target.device:
        return _not_measured(f"this run was on {machine['device']}")
    # Peak memory does not depend on the number of threads.
    if target.device == "cpu" and target.measure == "time" and machine["threads"] != THREADS_ON_CPU:
        return _not_measured(f"the target is for {THREADS_ON_CPU} threads, but this run had {machine['threads']}")
    baseline_kinds = {"growth": (target.kind,), "plain": PLAIN}.get(target.baseline, (target.baseline,))
    row = _best(target, rows, (target.kind,), target.length)
    baseline = _best(target, rows, baseline_kinds, target.baseline_length)
    for found, name in ((row, target.kind), (baseline, target.baseline)):
        if found is None:
            return _not_measured(f"there is no figure for {name} in this case")
    value, baseline_value = (_value(each, target.measure) for each in (row, baseline))
    unit = "ms" if target.measure == "time" else "MiB"
    return {
        "verdict": "reached" if value <= target.limit * baseline_value else "missed",
        "ratio": value / baseline_value,
        "detail": f"{value:.1f} {unit} and {baseline_value:.1f} {unit} ({baseline['implementation']})",
    }


def _not_measured(why: str) -> dict[str, Any]:
    return {"verdict": "not measured", "ratio": None, "detail": why}


def _best(target: Target, rows: Sequence[Row], kinds: Sequence[str], length: int) -> Row | None:
    _, heads, head_dim = TARGET_SHAPE[target.device]
    case = {"dtype": target.dtype, "batch": 1, "length": length, "heads": heads, "head_dim": head_dim}
    case |= {"window": target.window, "rank": 2, "not_measured": None}
    # Rows that were not measured lack some keys.
    matching = [row for row in rows if row.get("kind") in kinds and all(row.get(key, "") == case[key] for key in case)]
    return min(matching, key=lambda row: _value(row, target.measure), default=None)


def _value(row: Row, measure: str) -> float:
    return row["forward_backward"]["ms"] if measure == "time" else row["peak_bytes"] / 2**20


def _number(limit: float) -> str:
    return f"{limit:g}" if limit >= 1 else f"1/{1 / limit:g}"


COLORS = {
    "dense": "tab:red",
    "dense-compiled": "tab:orange",
    "chunked": "tab:blue",
    "compiled": "tab:cyan",
    "triton": "tab:green",
    "sdpa": "black",
    "flash-attn-4": "tab:pink",
    "flash-attn-3": "tab:olive",
    "flash-attn": "tab:gray",
    "windowed": "tab:purple",
}


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result to ``path``, plot it next to that, and print where they are."""
    write_json(path, result)
    print(f"written: {path}")
    if not any("times_plain" in row for row in result["rows"]):
        print("no plot: nothing was timed next to plain attention")
        return
    try:
        plot(result, path.with_suffix(".png"))
        print(f"plotted: {path.with_suffix('.png')}")
    except ModuleNotFoundError as error:
        print(f"no plot: {error.name} is not installed (pip install -c launch/constraints.txt matplotlib)")


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot time relative to plain attention, and peak memory, over the length: a column for each dtype and window.

    Only the cases with the heads and head dim of the first case are drawn.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator

    shape = tuple(result["rows"][0][name] for name in ("heads", "head_dim"))
    rows = [
        row
        for row in result["rows"]
        if row["not_measured"] is None and (row["heads"], row["head_dim"]) == shape and "times_plain" in row
    ]
    columns = list(dict.fromkeys((row["dtype"], row["window"]) for row in rows))
    lengths = sorted({row["length"] for row in rows})
    size = (1.6 + 3.4 * max(1, len(columns)), 7.2)
    figure, axes = pyplot.subplots(
        2, max(1, len(columns)), figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    handles = {}
    for (above, below), (dtype, window) in zip(axes.T, columns):
        above.set_title(f"{dtype}, {'no window' if window is None else f'window {window}'}")
        for name in dict.fromkeys(row["implementation"] for row in rows):
            line = [
                row for row in rows if (row["implementation"], row["dtype"], row["window"]) == (name, dtype, window)
            ]
            # Cases may have been measured in any order.
            line.sort(key=lambda row: row["length"])
            if line:
                handles[name] = _lines(above, below, line)
        for axis in (above, below):
            # Log scales with plain numbers at the ticks: 1k, 2k, ... and 1, 2, 5, 10, ...
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.margins(x=0.12)
            axis.set_xticks(lengths, [f"{length / 1024:g}k" for length in lengths])
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
            axis.minorticks_off()
            axis.grid(alpha=0.3)
        below.set_xlabel("T")
    axes[0, 0].set_ylabel("forward+backward\nx the fastest plain attention")
    axes[1, 0].set_ylabel("peak memory\nabove the inputs, MiB")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(5, len(handles)))
    machine, versions = result["machine"], result["versions"]
    figure.suptitle(
        f"{machine['name']}, H={shape[0]}, D={shape[1]}, torch {versions['torch']}, {result['date'][:10]}", fontsize=11
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _lines(above: Any, below: Any, rows: list[Row]) -> Any:
    """Plot the two lines of an implementation; returns the handle for the legend."""
    lengths = [row["length"] for row in rows]
    style = {"color": COLORS[rows[0]["kind"]], "marker": "o", "markersize": 4}
    if rows[0]["kind"] in PLAIN:
        variant = rows[0]["implementation"].partition(" ")[2]
        style["linestyle"] = {"cudnn": "--", "efficient": ":", "deterministic": "--"}.get(variant, "-")
    below.plot(lengths, [row["peak_bytes"] / 2**20 for row in rows], **style)
    return above.plot(lengths, [row["times_plain"]["forward_backward"] for row in rows], **style)[0]
