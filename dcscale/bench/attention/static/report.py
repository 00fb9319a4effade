"""Rows of the static report: of a kernel and of a call; as a table for the screen, as JSON, and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dcscale.bench.attention.static.compilation import Binary
from dcscale.bench.attention.static.cost import (
    FLASH,
    Flash,
    Rates,
    Work,
    cost,
    efficiency,
    l2_hits,
    slots,
)
from dcscale.bench.attention.static.paths import Code
from dcscale.bench.attention.static.sass import CLASSES, products_with_a_in_registers
from dcscale.cli import ResultError

MODEL = "model, not measured"
Row = dict[str, Any]
DIRECTIONS = ("forward", "backward")


def kernel_row(work: Work, binary: Binary | None, heads: int, visible: int, rates: Rates | None) -> Row:
    """What is known of a kernel, as JSON.

    Args:
        work: its launches in one direction of a call.
        binary: the compiled kernel; None for operators of torch.
        heads: iterations that a loop is assumed to run if its code does not tell.
        visible: scores of the call.
        rates: the model's assumptions; None leaves out times.
    """
    row: Row = {
        "kernel": work.name,
        "direction": work.direction,
        "kind": work.kind,
        "launches": work.launches,
        "staged_per_visible": work.elements / visible,
        "slots": {},
    }
    hits = 1.0
    if binary is not None:
        row |= {name: getattr(binary, name) for name in ("warps", "registers", "spilled", "shared")}
        if work.kind == "product":
            row["products_with_a_in_registers"] = len(products_with_a_in_registers(binary.sass))
    if work.tiles is not None:
        code = Code(binary.sass)
        paths = code.paths(heads)
        row["slots"] = slots(paths, work.tiles, binary.warps, visible)
        row["tiles"] = work.tiles._asdict()
        row["instructions"] = {name: path.instructions for name, path in paths._asdict().items()}
        row["loops_with_assumed_trips"] = max(path.assumed for path in paths)
        a_thread = work.elements / sum(work.tiles) / (32 * binary.warps)
        row["loops"] = [
            (loop.trips or heads) * once.interior.instructions / a_thread
            for loop, once in code.inner_loops()
            if once.interior.counts["load"]
        ]
        if rates is not None:
            hits = l2_hits(work.traffic.again, work.tiles.seen, binary.registers, binary.shared, binary.warps, rates)
    row["slots_in_all"] = sum(row["slots"].values())
    if rates is None:
        return row
    found = cost(work, visible, rates, row["slots"], hits)
    row |= {
        "l2_hits": hits,
        "hbm_bytes": found.hbm_bytes,
        "l2_bytes": found.l2_bytes,
        "ps": found.ps,
        "bound": found.bound,
        "bounds": dict(found.bounds),
    }
    return row


def call_result(
    kernels: Iterable[tuple[Work, Binary | None]],
    case: Mapping[str, Any],
    arch: int,
    visible: int,
    share: float,
    rates: Rates | None,
) -> Row:
    """The kernels of a call, their sums, and the ratio to FlashAttention, as JSON.

    Args:
        kernels: forward and backward.
        case: fields of a :class:`dcscale.bench.attention.cases.Case`.
        arch: compute capability that they were compiled for.
        visible: scores of the call.
        share: of the scores that a causal call without a window sees, those that this call sees.
        rates: the model's assumptions; None leaves out times.
    """
    rows = [kernel_row(*kernel, case["heads"], visible, rates) for kernel in kernels]
    result = {"what": MODEL, "arch": arch, "case": dict(case), "visible": visible, "kernels": rows}
    result["sums"] = {
        name: _sums([row for row in rows if row["direction"] in directions])
        for name, directions in (*((each, (each,)) for each in DIRECTIONS), ("both", DIRECTIONS))
    }
    if rates is not None:
        result["times_flash"] = _times_flash(result["sums"], rates.flash(case["head_dim"]), rates.flash_both, share)
    return result


def _sums(rows: Sequence[Row]) -> Row:
    """Sums of kernels; launches of torch's operators are counted apart."""
    sums = {name: sum(row.get(name, 0) for row in rows) for name in ("slots_in_all", "ps", "hbm_bytes")}
    for name, wanted in (("launches", False), ("operators", True)):
        sums[name] = sum(row["launches"] for row in rows if (row["kind"] == "torch") == wanted)
    return sums


def _times_flash(sums: Mapping[str, Row], flash: Flash | None, both: float, share: float) -> Row | None:
    """Ratios to causal FlashAttention without a window, by version; None for a head dim without figures."""
    if flash is None:
        return None
    return {
        name: {"forward": sums["forward"]["ps"] * share / ps, "both": sums["both"]["ps"] * share / (ps * both)}
        for name, ps in flash._asdict().items()
    }


def add_measured(result: Row, measured_ms: Mapping[tuple[str, str], float], rates: Rates) -> None:
    """Put measured times of a call's kernels next to the model's, and the efficiency that follows.

    Args:
        result: of :func:`call_result`, with times; kernels get ``measured_ms``, ``measured_ps`` and ``efficiency``.
        measured_ms: of all launches of a kernel, by direction and name.
        rates: those of ``result``.
    """
    for row in result["kernels"]:
        ms = measured_ms.get((row["direction"], row["kernel"]))
        if ms is not None:
            row["measured_ms"] = ms
            row["measured_ps"] = ms * 1e9 / result["visible"]
            row["efficiency"] = efficiency(row["bounds"]["issue"], result["visible"], ms, rates)


# Columns of the table: of the classes of instructions, those that matter alone and the rest together.
_CLASS_COLUMNS = {
    "fp32": ("fp32",),
    "exp": ("exp",),
    "select": ("select",),
    "convert": ("convert", "half"),
    "int": ("integer",),
    "move": ("move",),
    "load": ("load",),
    "store": ("store",),
    "shuffle": ("shuffle",),
    "smem": ("shared",),
    "tensor": ("tensor",),
}
_CLASS_COLUMNS["rest"] = tuple(set(CLASSES) - {name for names in _CLASS_COLUMNS.values() for name in names})


def lines(result: Row) -> list[str]:
    """The table of a call."""
    case = result["case"]
    window = "no window" if case["window"] is None else f"window {case['window']}"
    shape = f"T={case['length']} H={case['heads']} D={case['head_dim']} R={case['rank']}"
    head = f"sm_{result['arch']}, {case['dtype']} B={case['batch']} {shape}, {window}: {MODEL}, for each visible score"
    measured = any("measured_ps" in row for row in result["kernels"])
    columns = ["", "launches", "regs", "spill B", "smem B", "slots", *_CLASS_COLUMNS, "HBM B", "L2 B", "ps", "bound"]
    columns += ["measured ps", "efficiency"] if measured else []
    cells = [columns]
    for direction in DIRECTIONS:
        for row in result["kernels"]:
            if row["direction"] == direction:
                cells.append(_cells(row, measured))
        sums = result["sums"][direction]
        total = [
            f"= {direction}",
            sums["launches"],
            *[""] * 3,
            _digits(sums["slots_in_all"]),
            *[""] * len(_CLASS_COLUMNS),
        ]
        total += [_digits(sums["hbm_bytes"]), "", _digits(sums["ps"], 2)]
        cells.append([*total, *[""] * (len(columns) - len(total))])
    widths = [max(len(str(line[i])) for line in cells) for i in range(len(columns))]
    table = [
        "  ".join([str(line[0]).ljust(widths[0]), *(str(x).rjust(width) for x, width in zip(line[1:], widths[1:]))])
        for line in cells
    ]
    return [head, *(("  " + line).rstrip() for line in table), *_ratio_lines(result)]


def _cells(row: Row, measured: bool) -> list[Any]:
    flags = "".join(
        text
        for text, present in (
            (" (assumed trips)", row.get("loops_with_assumed_trips")),
            (" (wgmma with A in registers!)", row.get("products_with_a_in_registers")),
        )
        if present
    )
    counts = [sum(row["slots"].get(name, 0) for name in names) for names in _CLASS_COLUMNS.values()]
    cells = [f"{row['direction'][0]} {row['kernel']}{flags}", row["launches"]]
    cells += [row.get(name, "") for name in ("registers", "spilled", "shared")]
    cells += [_digits(row["slots_in_all"]), *map(_digits, counts)]
    cells += [_digits(row.get("hbm_bytes")), _digits(row.get("l2_bytes")), _digits(row.get("ps"), 2)]
    cells.append(row.get("bound", ""))
    if measured:
        cells += [_digits(row.get("measured_ps"), 2), _digits(row.get("efficiency"), 2)]
    return cells


def _ratio_lines(result: Row) -> list[str]:
    both = result["sums"]["both"]
    text = f"  forward and backward: {both['launches']} launches and {both['operators']} operators of torch"
    text += f", {both['slots_in_all']:.1f} slots"
    if "times_flash" not in result:
        return [f"{text}; no times: the model's rates are for sm_90 and 16-bit input"]
    times, kept = result["times_flash"], result.get("kept")
    found = [f"{text}, {both['ps']:.1f} ps"]
    if kept is not None:
        scratch = "the default scratch" if kept["by_default"] else f"{kept['scratch_mib']} MiB of scratch"
        sums = ", ".join(f"{each} {kept['sums'][each]['ps']:.1f} ps" for each in DIRECTIONS)
        found.append(f"  kept under activation checkpointing, with {scratch}: {sums}")
    if times is None:
        return [*found, f"  no figure of FlashAttention for a head dim of {result['case']['head_dim']}"]
    for name, ratios in times.items():
        label = name.replace("version_", "FlashAttention-")
        found.append(f"  {ratios['forward']:.2f} x forward, {ratios['both']:.2f} x both: {label}, causal, no window")
    return found


def _digits(number: float | None, digits: int = 1) -> str:
    return "" if not number else f"{number:.{digits}f}"


def assumption_lines(rates: Rates) -> list[str]:
    """The model's assumptions with their sources."""
    found = [f"assumptions ({MODEL}); --assume NAME=VALUE replaces one:"]
    for name, each in rates.describe().items():
        value = "" if each["value"] is None else f"{each['value']:g} "
        found.append(f"  {name} = {value}{each['unit']} ({each['source']})")
    figures = ", ".join(f"{flash.version_2:g} and {flash.version_3:g} (D={dim})" for dim, flash in FLASH.items())
    found.append(f"  flash_2 and flash_3 by head dim: {figures}")
    return found


_HEAD = (
    "",
    *("slots forward", "backward"),
    *("most registers", "spilled B", "launches"),
    *("ps forward", "backward", "both", "x FlashAttention-2", "x FlashAttention-3"),
)


def markdown(result: Row, before: Row | None = None) -> str:
    """A static result as Markdown, next to an earlier one if there is one.

    Raises:
        ResultError: the JSON is not a static result.
    """
    try:
        found = [f"**{MODEL.capitalize()}**, {result['date'][:10]}.", ""]
        found += [f"| {' | '.join(_HEAD)} |", "|" + "---|" * len(_HEAD)]
        earlier = {_key(each): each for each in before["calls"]} if before else {}
        for each in result["calls"]:
            cells = [_markdown_cells(each)]
            if _key(each) in earlier:
                cells.insert(0, _markdown_cells(earlier[_key(each)]))
            found.append(
                f"| {' | '.join([_name(each), *(' -> '.join(dict.fromkeys(pair)) for pair in zip(*cells))])} |"
            )
        return "\n".join(found)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ResultError(f"it is not a static result of bench_attention: {type(error).__name__} {error}") from error


def _key(call: Row) -> tuple:
    return (call["arch"], call["versions"]["triton"], *call["case"].values())


def _name(call: Row) -> str:
    case = call["case"]
    window = "" if case["window"] is None else f", window {case['window']}"
    return f"sm_{call['arch']}, Triton {call['versions']['triton']}, H={case['heads']}, D={case['head_dim']}{window}"


def _markdown_cells(call: Row) -> list[str]:
    sums, compiled = call["sums"], [row for row in call["kernels"] if "registers" in row]
    cells = [f"{sums[each]['slots_in_all']:.1f}" for each in DIRECTIONS]
    cells += [str(max(row["registers"] for row in compiled)), str(max(row["spilled"] for row in compiled))]
    cells.append(str(sums["both"]["launches"]))
    cells += [f"{sums[each]['ps']:.1f}" if sums[each]["ps"] else "-" for each in (*DIRECTIONS, "both")]
    times = call.get("times_flash")
    return cells + [f"{times[name]['both']:.2f}" if times else "-" for name in Flash._fields]
