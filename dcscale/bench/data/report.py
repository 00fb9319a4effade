"""A result in words: tables of Markdown, which are read on a screen as well, from the JSON alone.

What this project wants of its data path, and what a run says of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dcscale.cli import ResultError, short

NOT_MEASURED = "not measured"
_MILLION = 1e6


def markdown(result: Mapping[str, Any]) -> str:
    """All tables that the result has. Raises ResultError."""
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
    """Rates of all readers."""
    cells = []
    for row in rows:
        head = [f"{row['kind']}, {row['note']}" if row["note"] else row["kind"], row["place"], row["workers"]]
        if row["not_measured"] is not None:
            cells.append([*head, f"{NOT_MEASURED}: {row['not_measured']}", "", ""])
            continue
        figures = [_spread(row[name], _MILLION) for name in ("tokens_per_cpu_second", "tokens_per_second")]
        cells.append([*head, *figures, _spread(row["first_batch_seconds"])])
    names = ["reader", "from", "workers", "Mtok/CPU-s", "Mtok/s", "first batch s"]
    return [*_table(names, cells), "", "Median of the rounds, with the least and the most."]


def _amplification(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    cells = [[row["workers"], row["shards"], row["given"], f"{row['factor']:.2f}"] for row in rows]
    return _table(["workers", "shards", "given by the server in an epoch", "amplification"], cells)


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
    return _table(["slots", "shards a window", "peak MiB", "stated MiB"], cells)


def _orders(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = ("batch_variance", "lag_1", "stretch_variance")
    cells = [[row["order"], *("-" if row[n] is None else f"{row[n]:.2f}" for n in names)] for row in rows]
    return _table(["order", "batch variance", "lag-1 correlation", "variance of 100 batches"], cells)


def elastic(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What became of the rows of runs that were taken up by others."""
    shapes = list(dict.fromkeys(f"{_shape(row['before'])} -> {_shape(row['after'])}" for row in rows))
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        shape = f"{_shape(row['before'])} -> {_shape(row['after'])}"
        kinds.setdefault(row["kind"], {})[shape] = _outcome(row)
    cells = [[kind, *(found.get(shape, "") for shape in shapes)] for kind, found in kinds.items()]
    return [*_table(["reader", *shapes], cells), "", "R ranks of W workers each, before the stop -> after it."]


def faults(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which defects were noticed."""
    defects = list(dict.fromkeys(row["defect"] for row in rows))
    kinds: dict[str, dict[str, str]] = {}
    for row in rows:
        kinds.setdefault(row["kind"], {})[row["defect"]] = _outcome(row)
    cells = [[kind, *(found.get(defect, "") for defect in defects)] for kind, found in kinds.items()]
    legend = (
        "Silent: an epoch ended without an error, with so many rows fewer than there are, and so many that hold other "
        "tokens than those of the data. Logged only: the same, with an error among what was printed."
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
"""Part of a result -> its table."""


RATES = (("litdata", 1.0), ("mosaic", 3.0), ("webdataset", 5.0))
"""dcscale's tokens per CPU-second in one process, by those of others, at least."""

PLAN_SECONDS, PLAN_BYTES = 1.0, 300 << 20
SHARDS_A_SLOT = 2
"""Shards that are read to start again, for each slot."""


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target with "reached", "missed" or "not measured", and the figures."""
    rates = {(row["kind"], row["workers"]): row for row in result.get("rates", ()) if row["place"] == "disk"}
    found = [_rate(rates, kind, factor) for kind, factor in RATES]
    found.append(_workers(rates))
    for restart in [row for row in result.get("restarts", ()) if row["kind"] == "dcscale" and row.get("batch")]:
        most = SHARDS_A_SLOT * result["slots"]
        target = f"at most {SHARDS_A_SLOT} shards a slot are read to start again at batch {restart['batch']}"
        detail = f"{restart['shards_read']} shards for {result['slots']} slots"
        found.append(_verdict(target, restart["shards_read"] <= most, detail))
    for row in result.get("memory", ()):
        shape = f"{row['slots']} slots, windows of {row['shuffle_shards']} shards"
        detail = f"{row['bytes'] / 2**20:.0f} MiB of {row['bound_bytes'] / 2**20:.0f} MiB"
        found.append(_verdict(f"memory within what is stated ({shape})", row["bytes"] <= row["bound_bytes"], detail))
    if "plan" in result:
        plan = result["plan"]
        target = f"{plan['shards']:,} shards planned in {PLAN_SECONDS:g} s and {PLAN_BYTES >> 20} MiB"
        good = plan["seconds"] <= PLAN_SECONDS and plan["bytes"] <= PLAN_BYTES
        found.append(_verdict(target, good, f"{plan['seconds']:.2f} s, {plan['bytes'] / 2**20:.0f} MiB"))
    return found


def _rate(rates: Mapping[tuple[str, int], Mapping[str, Any]], kind: str, factor: float) -> dict[str, Any]:
    target = f"at least {factor:g} x {kind}'s tokens per CPU-second in one process"
    ours, other = rates.get(("dcscale", 0)), rates.get((kind, 0))
    for name, row in (("dcscale", ours), (kind, other)):
        if row is None or row["not_measured"] is not None:
            return _open(target, f"no figure for {name}")
    mine, theirs = (row["tokens_per_cpu_second"]["median"] for row in (ours, other))
    detail = f"{mine / 1e6:.1f} and {theirs / 1e6:.1f} million: {mine / theirs:.2f} x"
    return _verdict(target, mine >= factor * theirs, detail)


def _workers(rates: Mapping[tuple[str, int], Mapping[str, Any]]) -> dict[str, Any]:
    target = "two workers hand over more tokens a second than none"
    rows = [rates.get(("dcscale", count)) for count in (0, 2)]
    if any(row is None or row["not_measured"] is not None for row in rows):
        return _open(target, "no figures with 0 and 2 workers")
    none, two = (row["tokens_per_second"]["median"] for row in rows)
    return _verdict(target, two > none, f"{two / 1e6:.1f} and {none / 1e6:.1f} million: {two / none:.2f} x")


def _verdict(target: str, reached: bool, detail: str) -> dict[str, Any]:
    return {"target": target, "verdict": "reached" if reached else "missed", "detail": detail}


def _open(target: str, why: str) -> dict[str, Any]:
    return {"target": target, "verdict": "not measured", "detail": why}
