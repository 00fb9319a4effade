"""Time on the wall and on all cores, and memory, of this process and those that it has started."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import NamedTuple

_TICKS = os.sysconf("SC_CLK_TCK")


class Reading(NamedTuple):
    """Seconds, or the seconds between two readings."""

    wall: float
    cpu: float

    def since(self, earlier: Reading) -> Reading:
        return Reading(self.wall - earlier.wall, self.cpu - earlier.cpu)


def read() -> Reading:
    """Now. CPU seconds are of all threads, of children that have ended and of all living descendants."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() + ended.ru_utime + ended.ru_stime
    return Reading(time.perf_counter(), cpu + sum(_cpu_of(pid) for pid in descendants()))


def memory_bytes(name: str) -> int:
    """Memory of this process as the kernel counts it: ``VmRSS`` in use now, ``VmHWM`` the most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def reset_peak() -> None:
    """Let the peak begin at what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def descendants() -> list[int]:
    """Processes that this one, or one of them, has started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            parents[int(folder.name)] = int(fields[1])
    found, waiting = [], [os.getpid()]
    while waiting:
        parent = waiting.pop()
        children = [pid for pid, of in parents.items() if of == parent]
        found += children
        waiting += children
    return found


def _cpu_of(pid: int) -> float:
    fields = _stat(pid)
    return sum(map(int, fields[11:15])) / _TICKS if fields else 0.0


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
