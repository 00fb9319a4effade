"""What this project wants of its data path, and what a run says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
