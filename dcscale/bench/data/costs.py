"""What reading costs beside time: how much is read, memory, and starting again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcscale.bench.data import probe
from dcscale.bench.data.reader import Settings
from dcscale.data.manifest import read_manifest
from dcscale.testing.shard_server import ShardServer

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
    """Peak memory of an epoch beside what :class:`dcscale.data.stream.SequenceStream` states, by (slots, shards).

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
