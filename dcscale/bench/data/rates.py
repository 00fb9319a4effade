"""Rates of all readers on the same data: rounds in turn, each reading in a process of its own.

What reading costs beside time: how much is read, memory, and starting again.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcscale.bench.data import probe
from dcscale.bench.data.reader import Settings
from dcscale.data.shards.manifest import read_manifest
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


RESTARTED = ("dcscale", "mosaic", "litdata")
"""Readers with a state of which the time to start again is measured."""

_READ_THREADS = 8
"""What open_stream reads at once where it is not told."""


def amplification(address: str, server: ShardServer, settings: Settings, workers: Sequence[int]) -> list[dict]:
    """Shards that the web server gave for an epoch, by those there are; rows cover what is stated for one reader."""
    rows = []
    shards = len(read_manifest(address).shards)
    for count in workers:
        server.requests.clear()
        mine = replace(settings, root=address, workers=count)
        probe.run("rows", "dcscale", replace(mine, read_ahead=0))
        given = sum(path.endswith(".tar") for path in server.paths())
        rows.append({"workers": count, "shards": shards, "given": given, "factor": given / shards})
    return rows


def restarts(folders: dict[str, Path], settings: Settings, epoch: int, at: Sequence[float], rounds: int) -> list[dict]:
    """Seconds to the first batch of an epoch of so many batches, and after a restore at each part of it.

    Without workers. The shards are those that the first batch needs, read without reading ahead.
    """
    rows = []
    for kind in [kind for kind in RESTARTED if kind in folders]:
        mine = replace(settings, root=str(folders[kind]))
        try:
            places = [max(1, int(part * epoch)) for part in at]
            states = probe.run("states", kind, mine, batches=places)
            for place, state in [(0, None), *zip(places, states)]:
                found = [probe.run("first_batch", kind, mine, state=state)["seconds"] for _ in range(rounds)]
                needed = probe.run("first_batch", kind, replace(mine, read_ahead=0), state=state)
                row = {"kind": kind, "batch": place, "of": epoch, "seconds": statistics.median(found)}
                rows.append(row | {"not_measured": None, "shards_read": needed.get("shards_read")})
        except probe.ProbeError as error:
            rows.append({"kind": kind, "not_measured": str(error)})
    return rows


def memory(folder: Path, small: Path, settings: Settings, shapes: Sequence[tuple[int, int]]) -> list[dict]:
    """Peak memory of an epoch next to what :class:`dcscale.data.SequenceStream` states, by (slots, shards).

    It is what reading ``folder`` takes more than reading ``small``, which is next to nothing and shows what libraries
    take at their first use. The C library is told to use one arena: else it keeps freed memory for each thread.
    """
    shards = read_manifest(folder).shards
    most = {name: max(getattr(shard, name) for shard in shards) for name in ("tokens", "bytes", "documents")}
    packed, raw = 2 * most["tokens"] + 8 * most["documents"], most["bytes"] + 128 * most["documents"]
    rows = []
    for slots, window in shapes:
        mine = replace(settings, slots=slots, shuffle_shards=window)
        windows = min(slots, math.ceil(len(shards) / window)) + mine.read_ahead
        bound = packed * window * (windows + 1) + max(_READ_THREADS, window) * raw
        base, found = (
            probe.run("peak", "dcscale", replace(mine, root=str(root)), environment={"MALLOC_ARENA_MAX": "1"})["bytes"]
            for root in (small, folder)
        )
        rows.append({"slots": slots, "shuffle_shards": window, "bytes": found - base, "bound_bytes": bound})
    return rows
