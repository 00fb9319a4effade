"""What torch's flight recorder knows about the collectives of this process, on gloo and NCCL.

It records them if TORCH_FR_BUFFER_SIZE is set before the process groups are created, as ``start_distributed`` does.
Where a version of torch has none, nothing is known, and a hang is judged by phases and stacks alone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Collective:
    """One collective of this process."""

    group: str
    """Name of the process group, the same on all ranks."""

    sequence: int
    """Number of the collective in its group."""

    op: str
    sizes: list[list[int]]
    """Shapes of the inputs."""

    created: float
    """When it was started, in seconds since the epoch."""

    done: bool

    def __str__(self) -> str:
        sizes = ", ".join("x".join(map(str, size)) for size in self.sizes)
        return f"{self.op} {self.sequence} of group {self.group}" + (f" ({sizes})" if sizes else "")


Interval = tuple[float, float | None]
"""Begin and end of a step, in seconds since the epoch; no end while it is running."""


def _dumps() -> list[Callable[..., bytes]]:
    """The functions of this torch that dump a recorder: one of gloo's, and with CUDA one of NCCL's."""
    c10d = getattr(torch._C, "_distributed_c10d", None)
    names = ("_dump_fr_trace_json", "_dump_nccl_trace_json")
    return [getattr(c10d, name) for name in names if hasattr(c10d, name)]


def started_collectives() -> dict[str, int]:
    """Number of the last collective that this process has started, by process group; takes about 20 µs."""
    started = {}
    for dump in _dumps():
        for group, status in json.loads(dump(False, True)).get("pg_status", {}).items():
            started[group] = int(status["last_enqueued_collective"])
    return started


def recorded_collectives() -> list[Collective]:
    """The last collectives of this process, oldest first; takes up to 0.1 s for 2000 of them."""
    found = []
    for dump in _dumps():
        entries = json.loads(dump(True, False)).get("entries", [])
        found += [_collective(entry) for entry in entries if not entry.get("is_p2p")]
    return sorted(found, key=lambda collective: collective.created)


def _collective(entry: dict[str, Any]) -> Collective:
    return Collective(
        group=str(entry["process_group"][0]),
        sequence=int(entry["collective_seq_id"]),
        op=entry["profiling_name"].rpartition(":")[2],
        sizes=entry.get("input_sizes", []),
        created=entry["time_created_ns"] / 1e9,
        done=bool(entry.get("retired")) or entry.get("state") == "completed",
    )


def members(group: str) -> list[int] | None:
    """The ranks of a process group, by its name; None if this process does not know it."""
    if not dist.is_initialized():
        return None
    for process_group in dist.distributed_c10d._world.pg_map:
        if process_group.group_name == group:
            return dist.get_process_group_ranks(process_group)
    return None


def unlikeness(collectives: Sequence[Collective], steps: Sequence[Interval], most_steps: int = 8) -> int:
    """In how many collectives the last step differs from the most similar of the steps before it.

    Tells which rank deviates most where the step is unlike earlier ones on all, such as the first after a checkpoint.

    Args:
        collectives, steps: see :func:`deviation`.
        most_steps: steps to compare with, as a comparison takes time.
    """
    *before, last = _by_step(collectives, steps) or [[]]
    counts, running = [], bool(steps) and steps[-1][1] is None
    for step in before[-most_steps:]:
        count = 0
        kinds = [[_kind(collective) for collective in part] for part in (step, last)]
        for edit, begin, end, start, stop in SequenceMatcher(None, *kinds, autojunk=False).get_opcodes():
            if edit != "equal":
                # What the step before had at its end may still come in one that is running.
                missing = 0 if running and end == len(step) else end - begin
                count += max(missing, stop - start)
        counts.append(count)
    return min(counts, default=0)


def _by_step(collectives: Sequence[Collective], steps: Sequence[Interval]) -> list[list[Collective]]:
    """The collectives of each step of which all are recorded."""
    recorded = [step for step in steps if collectives and step[0] >= collectives[0].created]
    return [[c for c in collectives if begin <= c.created <= (end or math.inf)] for begin, end in recorded]


def deviation(collectives: Sequence[Collective], steps: Sequence[Interval]) -> str | None:
    """How the collectives of the last step differ from those of the steps before it.

    It must be like any one of them, since not all steps are alike: under ZeRO-3 a step after a validation gathers fewer
    parameters.

    Args:
        collectives: what was recorded, oldest first.
        steps: when the last steps were, oldest first. Only the last one may be running, and so be a part of another.

    Returns:
        A sentence without its subject; None if there is no difference, or no earlier step of which all is recorded.
    """
    recorded = _by_step(collectives, steps)
    if len(recorded) < 2:
        return None
    *before, last = recorded
    running = steps[-1][1] is None
    differences = []
    for step in reversed(before):
        same = sum(1 for _ in itertools.takewhile(lambda pair: _alike(*pair), zip(step, last)))
        if same == len(last) and (running or same == len(step)):
            return None
        differences.append((same, step))
    same, step = max(differences, key=lambda difference: difference[0])  # the most similar step
    if same == len(last):
        return f"left out {step[same]} of a step before"
    if same == len(step):
        return f"started {last[same]}, which no step before had"
    return f"started {last[same]} where steps before had {step[same]}"


def _alike(one: Collective, other: Collective) -> bool:
    return _kind(one) == _kind(other)


def _kind(collective: Collective) -> tuple[str, str, str]:
    return collective.group, collective.op, str(collective.sizes)
