"""A result in words: tables of Markdown, which are read on a screen as well, from the JSON alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dcscale.bench.record import ResultError, short

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
