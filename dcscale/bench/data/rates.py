"""Rates of all readers on the same data: rounds in turn, each reading in a process of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcscale.bench.data import probe
from dcscale.bench.data.reader import Settings
from dcscale.testing.shard_server import ShardServer

LATENCY = 0.05
"""Seconds before the web server's answers."""

OVER_HTTP = {
    "dcscale": {"": {}, "no read-ahead": {"read_ahead": 0}},
    "webdataset": {"": {}},
    "webdataset-bundles": {"": {}},
}
"""Readers that read from a web server here, and how."""


@dataclass(frozen=True)
class Case:
    """A row of the table."""

    kind: str
    place: str
    """``disk`` or ``http``."""

    settings: Settings
    note: str = ""


def cases(
    folders: dict[str, Path],
    server: ShardServer,
    root: Path,
    workers: Sequence[int],
    http_workers: Sequence[int],
    **settings: Any,
) -> list[Case]:
    """Every reader with every number of workers from disk, and from the server those that can."""
    made = []
    for count in workers:
        for kind, folder in folders.items():
            made.append(Case(kind, "disk", Settings(str(folder), workers=count, **settings)))
    for count in http_workers:
        for kind, variants in OVER_HTTP.items():
            if kind in folders:
                address = f"{server.address}/{folders[kind].relative_to(root)}"
                for note, more in variants.items():
                    made.append(Case(kind, "http", Settings(address, workers=count, **{**settings, **more}), note))
    return made


def measure(
    cases: Iterable[Case], histogram: Path, rounds: int, epochs: int, deadline: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """A row of figures each.

    A round opens each case once, and times so many epochs, so that whatever slows the machine for a while slows all
    alike. After ``deadline``, a time of :func:`time.monotonic`, no round begins but the first. A case that hands over
    other tokens than those of the data, or ends with an error, is not timed and not read again.
    """
    found: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    failed: dict[Case, str] = {}
    more = {"histogram": str(histogram), "epochs": epochs}
    for number in range(rounds):
        if number and time.monotonic() > deadline:
            say(f"  time is up after {number} of {rounds} rounds")
            break
        for case in [case for case in found if case not in failed]:
            try:
                result = probe.run("rate", case.kind, case.settings, timeout=240, **more)
            except probe.ProbeError as error:
                failed[case] = str(error)
                continue
            if result["wrong"] is not None:
                failed[case] = f"wrong: {result['wrong']}"
            else:
                found[case].append(result)
        say(f"  round {number + 1} of {rounds} is done")
    return [row(case, results, failed.get(case)) for case, results in found.items()]


def row(case: Case, results: Sequence[dict[str, Any]], failure: str | None) -> dict[str, Any]:
    """Medians and extremes over the rounds."""
    head = {"kind": case.kind, "place": case.place, "note": case.note, "workers": case.settings.workers}
    if failure is not None:
        return head | {"not_measured": failure}
    epochs = [epoch for result in results for epoch in result["epochs"]]
    return head | {
        "not_measured": None,
        "rounds": len(results),
        "tokens_per_cpu_second": spread([epoch["tokens"] / epoch["cpu_seconds"] for epoch in epochs]),
        "tokens_per_second": spread([epoch["tokens"] / epoch["wall_seconds"] for epoch in epochs]),
        "first_batch_seconds": spread([r["first_batch_seconds"] for r in results]),
    }


def absent_row(kind: str, why: str) -> dict[str, Any]:
    """The row of a reader whose library is not installed."""
    return {"kind": kind, "place": "disk", "note": "", "workers": 0, "not_measured": why}


def serve(folder: Path) -> ShardServer:
    """A web server of the folder that waits before each answer."""
    server = ShardServer(folder)
    server.latency = LATENCY
    return server


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}
