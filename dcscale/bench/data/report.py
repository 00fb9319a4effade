"""Reports of a result, made from its JSON: Markdown tables for the screen and the README, and the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dcscale.cli import ResultError, short

NOT_MEASURED = "not measured"
_MILLION = 1e6


def markdown(result: Mapping[str, Any]) -> str:
    """Format all tables of a result.

    Raises:
        ResultError: the JSON is not a result of bench_data.
    """
    try:
        parts = [_origin(result)]
        for name, make in _TABLES.items():
            if name in result:
                parts.append(make(result[name]))
        return "\n\n".join("\n".join(part) for part in parts)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ResultError(f"it is not a result of bench_data: {type(error).__name__} {error}") from error


def _origin(result: Mapping[str, Any]) -> list[str]:
    machine, versions = result["machine"], result["versions"]
    names = [f"{name} {version}" for name, version in versions.items() if version is not None and name != "dcscale"]
    return [
        f"{machine['cores']} cores of an {machine['name']}, load {machine['load_average']} at the start; "
        f"{', '.join(names)}; {result['date'][:10]}, commit {result['commit']}; `{result['command']}`"
    ]


def rates(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of all readers' rates."""
    cells = []
    for row in rows:
        head = [f"{row['kind']}, {row['note']}" if row["note"] else row["kind"], row["place"], row["workers"]]
        if row["not_measured"] is not None:
            cells.append([*head, f"{NOT_MEASURED}: {row['not_measured']}", "", ""])
            continue
        figures = [_spread(row[name], _MILLION) for name in ("tokens_per_cpu_second", "tokens_per_second")]
        cells.append([*head, *figures, _spread(row["first_batch_seconds"])])
    names = ["reader", "from", "workers", "Mtok/CPU-s", "Mtok/s", "first batch s"]
    return [*_table(names, cells), "", "Median of the rounds (minimum-maximum)."]


def _amplification(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[row["workers"], row["shards"], row["given"], f"{row['factor']:.2f}"] for row in rows]
    return _table(["workers", "shards", "sent by the server in an epoch", "amplification"], cells)


def _restarts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = []
    for row in rows:
        if row["not_measured"] is not None:
            cells.append([row["kind"], f"{NOT_MEASURED}: {row['not_measured']}", "", ""])
            continue
        place = "the beginning" if row["batch"] == 0 else f"batch {row['batch']:,} of {row['of']:,}"
        read = "-" if row["shards_read"] is None else row["shards_read"]
        cells.append([row["kind"], place, f"{row['seconds']:.3f}", read])
    return _table(["reader", "started at", "first batch s", "shards it needs"], cells)


def _memory(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [
        [row["slots"], row["shuffle_shards"], f"{row['bytes'] / 2**20:.0f}", f"{row['bound_bytes'] / 2**20:.0f}"]
        for row in rows
    ]
    return _table(["slots", "shards per block", "peak MiB", "bound MiB"], cells)


def _orders(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("batch_variance", "lag_1", "stretch_variance")
    cells = [[row["order"], *("-" if row[n] is None else f"{row[n]:.2f}" for n in names)] for row in rows]
    return _table(["order", "batch variance", "lag-1 correlation", "variance of 100 batches"], cells)


def elastic(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of restarts with other ranks and workers."""
    shapes = list(dict.fromkeys(f"{_shape(row['before'])} -> {_shape(row['after'])}" for row in rows))
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        shape = f"{_shape(row['before'])} -> {_shape(row['after'])}"
        kinds.setdefault(row["kind"], {})[shape] = _outcome(row)
    cells = [[kind, *(found.get(shape, "") for shape in shapes)] for kind, found in kinds.items()]
    return [*_table(["reader", *shapes], cells), "", "R ranks with W workers each, before the stop -> after it."]


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of defects, and whether they were detected."""
    defects = list(dict.fromkeys(row["defect"] for row in rows))
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], {})[row["defect"]] = _outcome(row)
    cells = [[kind, *(found.get(defect, "") for defect in defects)] for kind, found in kinds.items()]
    legend = (
        "Silent: an epoch ended without an error; the numbers are missing rows and rows with wrong tokens. "
        "Logged only: the same, but an error was printed."
    )
    return [*_table(["reader", *defects], cells), "", legend]


def _targets(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return _table(["target", "", "measured"], [[row["target"], row["verdict"], row["detail"]] for row in rows])


def _outcome(row: Mapping[str, Any]) -> str:
    outcome = row["outcome"]
    if outcome in ("silent", "logged only"):
        return f"{outcome}: {row['fewer']} fewer, {row['other']} other"
    if outcome in ("not run", "refused"):
        return f"{outcome}: {row['error'][:60]}"
    return outcome


def _shape(shape: Sequence[int]) -> str:
    return f"R{shape[0]} W{shape[1]}"


def _spread(values: Mapping[str, float], unit: float = 1.0) -> str:
    median, least, most = (short(values[name] / unit) for name in ("median", "least", "most"))
    return f"{median} ({least}-{most})"


def _table(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    # A "|" would end the cell.
    cells = [[str(cell).replace("|", "/") for cell in row] for row in (names, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


_TABLES = {
    "rates": rates,
    "amplification": _amplification,
    "restarts": _restarts,
    "memory": _memory,
    "orders": _orders,
    "elastic": elastic,
    "faults": faults,
    "targets": _targets,
}
"""From the key of a part of a result to the function that formats its table."""


RATES = (("litdata", 1.0), ("mosaic", 3.0), ("webdataset", 5.0))
"""Targets of dcscale's tokens per CPU-second in one process, relative to other readers."""

PLAN_SECONDS, PLAN_BYTES = 1.0, 300 << 20
MAX_SHARDS_PER_SLOT = 2
"""Target of the shards that are read to restart, per slot."""


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, each with the verdict "reached", "missed" or "not measured", and the figures."""
    rates = {(row["kind"], row["workers"]): row for row in result.get("rates", ()) if row["place"] == "disk"}
    found = [_rate(rates, kind, factor) for kind, factor in RATES]
    found.append(_workers(rates))
    # Targets of parts that the result does not have are left out.
    for restart in [row for row in result.get("restarts", ()) if row["kind"] == "dcscale" and row.get("batch")]:
        limit = MAX_SHARDS_PER_SLOT * result["slots"]
        target = f"at most {MAX_SHARDS_PER_SLOT} shards per slot are read to restart at batch {restart['batch']}"
        detail = f"{restart['shards_read']} shards for {result['slots']} slots"
        found.append(_verdict(target, restart["shards_read"] <= limit, detail))
    for row in result.get("memory", ()):
        shape = f"{row['slots']} slots, blocks of {row['shuffle_shards']} shards"
        detail = f"{row['bytes'] / 2**20:.0f} MiB of {row['bound_bytes'] / 2**20:.0f} MiB"
        found.append(_verdict(f"memory within the stated bound ({shape})", row["bytes"] <= row["bound_bytes"], detail))
    if "plan" in result:
        plan = result["plan"]
        target = f"{plan['shards']:,} shards planned in {PLAN_SECONDS:g} s and {PLAN_BYTES >> 20} MiB"
        good = plan["seconds"] <= PLAN_SECONDS and plan["bytes"] <= PLAN_BYTES
        found.append(_verdict(target, good, f"{plan['seconds']:.2f} s, {plan['bytes'] / 2**20:.0f} MiB"))
    return found


def _rate(rates: Mapping[tuple[str, int], Mapping[str, Any]], kind: str, factor: float) -> dict[str, Any]:
    target = f"at least {factor:g} x {kind}'s tokens per CPU-second in one process"
    dcscale_reader, baseline = rates.get(("dcscale", 0)), rates.get((kind, 0))
    for name, row in (("dcscale", dcscale_reader), (kind, baseline)):
        if row is None or row["not_measured"] is not None:
            return _not_measured(target, f"no figure for {name}")
    rate, baseline_rate = (row["tokens_per_cpu_second"]["median"] for row in (dcscale_reader, baseline))
    detail = f"{rate / 1e6:.1f} and {baseline_rate / 1e6:.1f} million: {rate / baseline_rate:.2f} x"
    return _verdict(target, rate >= factor * baseline_rate, detail)


def _workers(rates: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    target = "two workers read more tokens per second than none"
    rows = [rates.get(("dcscale", count)) for count in (0, 2)]
    if any(row is None or row["not_measured"] is not None for row in rows):
        return _not_measured(target, "no figures with 0 and 2 workers")
    none, two = (row["tokens_per_second"]["median"] for row in rows)
    return _verdict(target, two > none, f"{two / 1e6:.1f} and {none / 1e6:.1f} million: {two / none:.2f} x")


def _verdict(target: str, reached: bool, detail: str) -> dict[str, Any]:
    return {"target": target, "verdict": "reached" if reached else "missed", "detail": detail}


def _not_measured(target: str, why: str) -> dict[str, Any]:
    return {"target": target, "verdict": "not measured", "detail": why}
