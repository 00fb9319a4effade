"""The model: from counts of instructions, bytes and flops to time. Nothing here is measured.

A mixing kernel takes as long as the slowest of what it needs: issue slots, exponentials, shared memory, L2, HBM, tensor
cores. A product takes as long as its flops or its bytes. Kernels add up; gaps between launches are not in it.

Times are in ps for each visible score: one query that sees one key, in one head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

from dcscale.bench.attention.static.paths import Paths
from dcscale.bench.attention.static.sass import CLASSES

_TABLE = "Throughput of Native Arithmetic Instructions, CUDA C++ Programming Guide"
_JUDGED = "judgement, not calibrated by any measurement"


class Flash(NamedTuple):
    """Plain attention by FlashAttention, causal, without a window: ps for each visible score, forward, by version."""

    version_2: float
    version_3: float


FLASH = {128: Flash(1.3, 0.8), 80: Flash(1.0, 0.62), 64: Flash(0.79, 0.52)}
"""By head dim, on H100, from rates published with FlashAttention-3 (arXiv 2407.08608) for long sequences: 4 D flop at
394 (D=128) and 324 TFLOP/s (D=64) for FlashAttention-2, at 640 and 492 for FlashAttention-3. D=80 is interpolated."""
_FLASH_SOURCE = "published rates on H100 (arXiv 2407.08608), by head dim; D=80 is interpolated"


def _rate(value: float | None, unit: str, source: str) -> float:
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Rates:
    """The model's assumptions, for Hopper (compute capability 9.0) with the memory of an H200."""

    sms: float = _rate(132, "multiprocessors", "data sheet of H100 and H200 SXM")
    clock: float = _rate(1.75, "GHz", "between the base and boost clocks of H100 and H200 SXM")
    issue_lanes: float = _rate(
        128, "lanes a clock and multiprocessor", "4 schedulers, each one warp instruction a clock"
    )
    efficiency: float = _rate(
        0.45, "of the issue slots", "measured on an H100: 0.41 to 0.49, first-look in tools/results"
    )
    exp_lanes: float = _rate(16, "lanes a clock and multiprocessor", _TABLE)
    shared_lanes: float = _rate(32, "lanes a clock and multiprocessor", f"shuffles: {_TABLE}; shared memory: 32 banks")
    tensor: float = _rate(700, "TFLOP/s", f"bf16 products of large matrices; {_JUDGED}")
    l2: float = _rate(5.5, "TB/s", f"{_JUDGED}; 4 to 7 are plausible")
    hbm: float = _rate(4.0, "TB/s", "of the H200's 4.8; 3.0 for the H100's 3.35")
    l2_size: float = _rate(50, "MB", "data sheet of H100 and H200 SXM")
    l2_kept: float = _rate(0.55, "of L2 holds what a later sweep over the heads reads again", _JUDGED)
    l2_most: float = _rate(0.95, "of what is read again hits L2 at most", _JUDGED)
    registers: float = _rate(65536, "of a multiprocessor", "CUDA C++ Programming Guide")
    memory: float = _rate(141, "GB, of which scratch takes a part", "data sheet of the H200")
    warps: float = _rate(64, "of a multiprocessor", "CUDA C++ Programming Guide")
    shared_size: float = _rate(228, "KiB of a multiprocessor, and 1 KiB of each program is reserved", "the same")

    flash_2: float | None = _rate(None, "ps, FlashAttention-2 forward", _FLASH_SOURCE)
    flash_3: float | None = _rate(None, "ps, FlashAttention-3 forward", _FLASH_SOURCE)
    flash_both: float = _rate(
        3.5, "times forward, forward and backward", "7 products instead of 2; published backward rates are lower"
    )

    def flash(self, head_dim: int) -> Flash | None:
        """The figures of FlashAttention that are given, or else those for the head dim, if there are any."""
        found = Flash(self.flash_2, self.flash_3)
        published = FLASH.get(head_dim)
        if published is not None:
            found = Flash(*(other if given is None else given for given, other in zip(found, published)))
        return None if None in found else found

    def describe(self) -> dict[str, dict[str, float | str | None]]:
        """Value, unit and source of each by name, as JSON; what differs from the default says so."""
        found = {}
        for each in fields(self):
            value = getattr(self, each.name)
            source = each.metadata["source"] if value == each.default else "given on the command line"
            found[each.name] = {"value": value, "unit": each.metadata["unit"], "source": source}
        return found


def override(rates: Rates, texts: Iterable[str]) -> Rates:
    """Rates with values replaced by such as ``hbm=3.0``.

    Raises:
        ValueError: a name is unknown, or a value is not a number above 0.
    """
    known = [each.name for each in fields(Rates)]
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise ValueError(f"{text!r}: {name!r} is no assumption of the model; it has {', '.join(known)}")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise ValueError(f"{text!r}: {value!r} must be a number above 0")
        rates = replace(rates, **{name: number})
    return rates


class Tiles(NamedTuple):
    """Numbers of tiles of a kernel's launches, by kind: see paths.py."""

    interior: int
    edge: int
    unseen: int

    @property
    def seen(self) -> int:
        """Those with anything visible."""
        return self.interior + self.edge


class Traffic(NamedTuple):
    """Bytes that a kernel's launches move, all together."""

    read: float = 0
    """Read for the first time."""
    again: float = 0
    """Read again in a later sweep over the heads: from L2 as far as it is still there."""
    written: float = 0
    operands: float = 0
    """Read from L2 in addition: tiles of a product's operands, again for each tile of its result."""
    added: float = 0
    """Read and written for sums that a product adds its result to when it is finished, so nothing overlaps them."""


class Work(NamedTuple):
    """What all launches of a kernel in one direction of a call do."""

    name: str
    direction: str
    """"forward" or "backward"."""
    kind: str
    """"mix", "product", "sum" or "layout" ("torch" for operators of torch that are none of these)."""
    launches: int
    traffic: Traffic
    elements: int = 0
    """Scores in the memory that it works on, padding and unseen ones included."""
    flops: float = 0
    """Of matrix products."""
    tiles: Tiles | None = None
    """For "mix"."""


def total(works: Iterable[Work]) -> Work:
    """The sum of some launches of a kernel."""

    def add(tuples: Iterable[Any]) -> Any:
        first, *others = tuples
        return type(first)(*map(sum, zip(first, *others, strict=True)))

    works = list(works)
    return works[0]._replace(
        launches=sum(work.launches for work in works),
        traffic=add(work.traffic for work in works),
        elements=sum(work.elements for work in works),
        flops=sum(work.flops for work in works),
        tiles=None if works[0].tiles is None else add(work.tiles for work in works),
    )


class Cost(NamedTuple):
    """What a kernel costs, for each visible score."""

    slots: Mapping[str, float]
    """Issue slots by class: instructions of a thread, divided by its scores."""
    bounds: Mapping[str, float]
    """ps that each resource takes, by name; issue slots at the assumed efficiency."""
    hbm_bytes: float
    l2_bytes: float
    ps: float

    @property
    def bound(self) -> str:
        """The resource that takes longest."""
        return max(self.bounds, key=self.bounds.__getitem__)


def slots(paths: Paths, tiles: Tiles, warps: int, visible: int) -> dict[str, float]:
    """Issue slots by class for each visible score, of all tiles of a kernel."""
    totals = dict.fromkeys(CLASSES, 0.0)
    for path, count in zip(paths, tiles):
        for name, number in path.counts.items():
            totals[name] += number * count
    return {name: total * warps * 32 / visible for name, total in totals.items() if total}


def l2_hits(again: float, seen: int, registers: int, shared: int, warps: int, rates: Rates) -> float:
    """The part of what is read again that is still in L2.

    The tiles in flight fill L2, so it is the smaller the more they read; between sweeps a tile reads all its heads.

    Args:
        again: bytes that all programs read again.
        seen: programs that do.
        registers: of a thread.
        shared: bytes of shared memory of a program.
        warps: of a program.
        rates: the assumptions.
    """
    if not again:
        return 1.0
    a_multiprocessor = min(
        rates.registers // (math.ceil(registers / 8) * 8 * warps * 32),
        rates.warps // warps,
        rates.shared_size // (math.ceil(shared / 1024) + 1),
    )
    in_flight = min(seen, max(1, a_multiprocessor) * rates.sms) * again / seen
    return min(rates.l2_most, rates.l2_kept * rates.l2_size * 1e6 / in_flight)


def cost(work: Work, visible: int, rates: Rates, slots: Mapping[str, float], hits: float) -> Cost:
    """The cost of a kernel.

    Args:
        work: its launches.
        visible: scores of the call.
        rates: the assumptions.
        slots: of :func:`slots`; empty for products and sums, whose loops depend on data.
        hits: of :func:`l2_hits`.
    """
    traffic = work.traffic
    hbm_bytes = (traffic.read + (1 - hits) * traffic.again + traffic.written) / visible
    l2_bytes = (traffic.read + traffic.again + traffic.written + traffic.operands) / visible
    added = traffic.added / visible

    def issue_ps(number: float, lanes: float) -> float:
        return number * 1e3 / (rates.sms * lanes * rates.clock)

    bounds = {
        "issue": issue_ps(sum(slots.values()), rates.issue_lanes) / rates.efficiency,
        "exp": issue_ps(slots.get("exp", 0), rates.exp_lanes),
        "shared": issue_ps(slots.get("shuffle", 0) + slots.get("shared", 0), rates.shared_lanes),
        "tensor": work.flops / visible / rates.tensor,
        "L2": l2_bytes / rates.l2,
        "HBM": hbm_bytes / rates.hbm,
    }
    ps = max(bounds.values()) + added / rates.hbm
    return Cost(slots, bounds, hbm_bytes + added, l2_bytes + added, ps)


def efficiency(issue_ps: float, visible: int, measured_ms: float, rates: Rates) -> float | None:
    """The part of all issue slots that a kernel used: its slots' time at full rate over its measured time.

    Args:
        issue_ps: the bound of issue slots of :func:`cost`; 0 gives None.
        visible: scores of the call.
        measured_ms: of all launches in the call.
        rates: those of ``issue_ps``.
    """
    return issue_ps * rates.efficiency * visible * 1e-9 / measured_ms if issue_ps else None
