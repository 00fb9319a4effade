"""The speeds that this project wants to reach, and what a run says of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dcscale.bench.attention.cases import CENTRE, Row

THREADS_ON_CPU = 2
"""The times on a CPU are wanted with as many."""


@dataclass(frozen=True)
class Target:
    """``ours`` is at most ``limit`` times ``other`` in ``measure``, where H, D are the device's centre, B=1, rank 2.

    measure: "time" of forward and backward, or "peak memory". ``other``: a kind, whose fastest counts; or "growth":
    then the peak is compared with that at a length of ``other_length``.
    """

    device: str
    ours: str
    limit: float
    measure: str
    other: str
    dtype: str
    window: int | None = None
    length: int = 4096
    other_length: int = 4096

    def __str__(self) -> str:
        _, heads, head_dim = CENTRE[self.device]
        window = "no window" if self.window is None else f"window {self.window}"
        place = f"{self.dtype}, T={self.length}, H={heads}, D={head_dim}, {window}"
        what = self.measure if self.measure != "time" else "forward+backward"
        other = {
            "dense": "the dense formula's",
            "dense-compiled": "the compiled dense formula's",
            "sdpa": "SDPA's without a window",
            "growth": f"that at T={self.other_length}",
        }[self.other]
        device = {"cuda": "GPU", "cpu": "CPU"}[self.device]
        return f"{device}: {self.ours}, {what} at most {_number(self.limit)} x {other} ({place})"


TARGETS = (
    Target("cuda", "triton", 3, "time", "sdpa", "bf16"),
    Target("cuda", "triton", 1, "time", "sdpa", "bf16", window=256),
    Target("cuda", "triton", 1 / 3, "time", "dense-compiled", "bf16"),
    Target("cuda", "triton", 1 / 10, "time", "dense", "bf16"),
    Target("cuda", "triton", 1 / 8, "peak memory", "dense", "bf16"),
    *(
        Target("cpu", ours, limit, "time", "sdpa", dtype, window)
        for ours in ("chunked", "compiled")
        for dtype in ("fp32", "bf16")
        for window, limit in ((None, 3), (256, 1))
    ),
    # A map of T x S would grow by 16.
    *(
        Target("cpu", ours, 4, "peak memory", "growth", dtype, window, other_length=1024)
        for ours in ("chunked", "compiled")
        for dtype in ("fp32", "bf16")
        for window in (None, 256)
    ),
)


def judge(rows: Sequence[Row], machine: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each target with the ratio that was measured and "reached", "missed" or "not measured"."""
    return [{"target": str(target), "limit": target.limit, **_verdict(target, rows, machine)} for target in TARGETS]


def _verdict(target: Target, rows: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, Any]:
    if machine["device"] != target.device:
        return _not_measured(f"this run was on {machine['device']}")
    if target.device == "cpu" and target.measure == "time" and machine["threads"] != THREADS_ON_CPU:
        return _not_measured(f"the target is for {THREADS_ON_CPU} threads, and this run had {machine['threads']}")
    ours = _best(target, rows, target.ours, target.length)
    other = _best(target, rows, target.ours if target.other == "growth" else target.other, target.other_length)
    for row, name in ((ours, target.ours), (other, target.other)):
        if row is None:
            return _not_measured(f"there is no figure for {name} in this case")
    mine, theirs = (_value(row, target.measure) for row in (ours, other))
    unit = "ms" if target.measure == "time" else "MiB"
    return {
        "verdict": "reached" if mine <= target.limit * theirs else "missed",
        "ratio": mine / theirs,
        "detail": f"{mine:.1f} {unit} and {theirs:.1f} {unit} ({other['implementation']})",
    }


def _not_measured(why: str) -> dict[str, Any]:
    return {"verdict": "not measured", "ratio": None, "detail": why}


def _best(target: Target, rows: Sequence[Row], kind: str, length: int) -> Row | None:
    _, heads, head_dim = CENTRE[target.device]
    case = {"dtype": target.dtype, "batch": 1, "length": length, "heads": heads, "head_dim": head_dim}
    case |= {"window": target.window, "rank": 2, "not_measured": None, "kind": kind}
    fitting = [row for row in rows if all(row.get(key, "") == value for key, value in case.items())]
    return min(fitting, key=lambda row: _value(row, target.measure), default=None)


def _value(row: Row, measure: str) -> float:
    return row["forward_backward"]["ms"] if measure == "time" else row["peak_bytes"] / 2**20


def _number(limit: float) -> str:
    return f"{limit:g}" if limit >= 1 else f"1/{1 / limit:g}"
