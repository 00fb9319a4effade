"""A result in words: the table on the screen, the targets, and the tables of the README, all from the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dcscale.bench.attention.cases import PASSES, Case, Row
from dcscale.bench.attention.implementations import KINDS
from dcscale.bench.record import ResultError, short

_CASE = tuple(Case.__dataclass_fields__)
_COLUMNS = ("", "forward ms", "fwd+bwd ms", "quartiles", "x SDPA", "x windowed", "TFLOP/s", "peak MiB", "")
LEGEND = (
    "of two figures in a cell the first is forward's, the second of forward and backward; x SDPA: the time by that of\n"
    "the fastest SDPA without a window, x windowed: by that of dcscale.ops.attention; peak MiB: above the inputs"
)
NOT_MEASURED = "not measured"


def case_lines(rows: Sequence[Row]) -> list[str]:
    """The table of one case: its implementations that were measured."""
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
                row["implementation"],
                f"{forward['ms']:.2f}",
                f"{both['ms']:.2f}",
                f"{low:.2f}-{high:.2f}",
                _ratios(row, "times_sdpa"),
                _ratios(row, "times_windowed"),
                f"{short(forward['tflops'])} {short(both['tflops'])}",
                f"{row['peak_bytes'] / 2**20:,.0f}",
                "; ".join(notes),
            )
        )
    widths = [max(len(line[i]) for line in cells) for i in range(len(_COLUMNS))]
    lines = []
    for first, *others, last in cells:
        padded = [text.rjust(width) for text, width in zip(others, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return ["  " + line for line in lines]


def missing_lines(rows: Sequence[Row]) -> list[str]:
    """Implementations that were not measured, with the reason."""
    return [f"  {row['implementation']}: {NOT_MEASURED}: {row['not_measured']}" for row in rows if row["not_measured"]]


def target_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line a target."""
    lines = []
    for each in verdicts:
        ratio = "" if each["ratio"] is None else f"{short(each['ratio'])} x, "
        lines.append(f"  {each['verdict']:12}  {each['target']}: {ratio}{each['detail']}")
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    """Of the JSON: where it was measured, forward+backward of every case, and the targets. Raises ResultError."""
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
        "Forward and backward: median of a call in milliseconds, by the fastest SDPA without a window of the same case",
        "(x), and peak memory above the inputs.",
    ]


def _table(rows: Sequence[Row]) -> list[str]:
    cases: dict[tuple, list[Row]] = {}
    for row in rows:
        cases.setdefault(tuple(row[name] for name in _CASE), []).append(row)
    lines = _head(["type", "B", "T", "H", "D", "window", *("SDPA" if kind == "sdpa" else kind for kind in KINDS)])
    for (dtype, batch, length, heads, head_dim, window, _), of_case in cases.items():
        cells = [dtype, batch, length, heads, head_dim, "-" if window is None else window]
        for kind in KINDS:
            timed = [row for row in of_case if row["not_measured"] is None and row["kind"] == kind]
            best = min(timed, key=lambda row: row["forward_backward"]["ms"], default=None)
            if best is None:
                cells.append("-" if kind == "windowed" and window is None else NOT_MEASURED)
                continue
            name = f" ({best['implementation'].removeprefix('sdpa ')})" if kind == "sdpa" else ""
            ratio = "" if kind == "sdpa" or "times_sdpa" not in best else f" ({short(best['times_sdpa'][PASSES[1]])}x)"
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
