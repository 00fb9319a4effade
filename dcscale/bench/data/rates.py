"""Rates of all readers on the same data, and the other costs of reading: read amplification, memory, restarts.

Every measurement runs in a process of its own (see :mod:`dcscale.bench.data.probe`).
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

OVER_HTTP = {
    "dcscale": {"": {}, "no read-ahead": {"read_ahead": 0}},
    "webdataset": {"": {}},
    "webdataset-bundles": {"": {}},
}
"""Readers that are also measured over HTTP: variants with a note and the settings that differ."""


@dataclass(frozen=True)
class Case:
    """A reader with settings: one row of the table."""

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
    """All readers from disk, and those of :data:`OVER_HTTP` from the server, with all numbers of workers."""
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
    """Measure the rates of all cases in turns, so that temporary slowdowns of the machine affect all alike.

    A case with wrong tokens or an error is not timed, and not read again.

    Args:
        cases: what to measure.
        histogram: file of the corpus' histogram.
        rounds: each round opens every case once.
        epochs: timed epochs of each opening.
        deadline: a time of :func:`time.monotonic` after which no round starts, except for the first.
        say: receives progress.

    Returns:
        A row of figures for each case.
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
                # tools/bench_data.py exits with an error on this prefix.
                failed[case] = f"wrong: {result['wrong']}"
            else:
                found[case].append(result)
        say(f"  round {number + 1} of {rounds} is done")
    return [row(case, results, failed.get(case)) for case, results in found.items()]


def row(case: Case, results: Sequence[dict[str, Any]], failure: str | None) -> dict[str, Any]:
    """The row of a case: median, minimum and maximum over all rounds and epochs."""
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


def serve(folder: Path, latency: float) -> ShardServer:
    """A web server of the folder that waits ``latency`` seconds before each response."""
    server = ShardServer(folder)
    server.latency = latency
    return server


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


RESTARTED = ("dcscale", "mosaic", "litdata")
"""Readers with a state, whose restarts are timed."""

_READ_THREADS = 8
"""Default number of threads of open_stream."""


def amplification(address: str, server: ShardServer, settings: Settings, workers: Sequence[int]) -> list[dict]:
    """How many times as many shards the web server sends in an epoch as there are, by number of workers."""
    rows = []
    shards = len(read_manifest(address).shards)
    for count in workers:
        server.requests.clear()  # count the requests of this run only
        probe.run("rows", "dcscale", replace(settings, root=address, workers=count, read_ahead=0))
        given = sum(path.endswith(".tar") for path in server.paths())
        rows.append({"workers": count, "shards": shards, "given": given, "factor": given / shards})
    return rows


def restarts(folders: dict[str, Path], settings: Settings, epoch: int, at: Sequence[float], rounds: int) -> list[dict]:
    """Time to the first batch, and number of shards it needs, without workers: from the start and after restarts.

    Args:
        folders: of each kind's data.
        settings: of the readers.
        epoch: batches of an epoch.
        at: fractions of the epoch at which to restart.
        rounds: repetitions, whose median counts.
    """
    rows = []
    for kind in [kind for kind in RESTARTED if kind in folders]:
        kind_settings = replace(settings, root=str(folders[kind]))
        try:
            batches = [max(1, int(fraction * epoch)) for fraction in at]
            states = probe.run("states", kind, kind_settings, batches=batches)
            for batch, state in [(0, None), *zip(batches, states)]:
                seconds = [probe.run("first_batch", kind, kind_settings, state=state)["seconds"] for _ in range(rounds)]
                # Without prefetching, only the shards that the first batch needs are read.
                needed = probe.run("first_batch", kind, replace(kind_settings, read_ahead=0), state=state)
                row = {"kind": kind, "batch": batch, "of": epoch, "seconds": statistics.median(seconds)}
                rows.append(row | {"not_measured": None, "shards_read": needed.get("shards_read")})
        except probe.ProbeError as error:
            rows.append({"kind": kind, "not_measured": str(error)})
    return rows


def memory(folder: Path, small: Path, settings: Settings, shapes: Sequence[tuple[int, int]]) -> list[dict]:
    """Peak memory of an epoch compared with the bound that :class:`dcscale.data.Stream` states, by (slots, shards).

    Args:
        folder: the data.
        small: very little data. Its peak, the memory that libraries allocate at their first use, is subtracted.
        settings: of the reader.
        shapes: (slots, shards of a shuffle block) to measure.
    """
    shards = read_manifest(folder).shards
    largest = {name: max(getattr(shard, name) for shard in shards) for name in ("tokens", "bytes", "documents")}
    # The terms of the stated bound: packed tokens (uint16) with document offsets (int64), and raw shards being read.
    packed, raw = 2 * largest["tokens"] + 8 * largest["documents"], largest["bytes"] + 128 * largest["documents"]
    # A single malloc arena, because glibc keeps freed memory in every thread's arena.
    one_arena = {"MALLOC_ARENA_MAX": "1"}
    rows = []
    for slots, shuffle_shards in shapes:
        shape_settings = replace(settings, slots=slots, shuffle_shards=shuffle_shards)
        blocks = min(slots, math.ceil(len(shards) / shuffle_shards)) + settings.read_ahead
        bound = packed * shuffle_shards * (blocks + 1) + max(_READ_THREADS, shuffle_shards) * raw
        base, found = (
            probe.run("peak", "dcscale", replace(shape_settings, root=str(root)), environment=one_arena)["bytes"]
            for root in (small, folder)
        )
        rows.append({"slots": slots, "shuffle_shards": shuffle_shards, "bytes": found - base, "bound_bytes": bound})
    return rows
