"""Time and memory of functions: on a GPU by its own clock and counter, on a CPU by those of Python and the profiler.

Time on the wall and on all cores, and memory, of this process and those that it has started.
"""

from __future__ import annotations

import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

Name = TypeVar("Name", bound=Hashable)
Run = Callable[[], object]

FEWEST_ROUNDS, MOST_ROUNDS = 3, 50
_LARGER_THAN_ANY_CACHE = 2**28
"""Bytes that are written before each call on a GPU, so that none finds its input in the L2 cache."""

_CONTROL_GROUP = Path("/sys/fs/cgroup")
"""Where Linux tells what a container may use."""


def time_in_turns(
    runs: Mapping[Name, Run], device: str, seconds: float, deadline: float
) -> tuple[dict[Name, list[float]], dict[Name, str]]:
    """(milliseconds of every call, why a run has none) by name. Every run has been called before.

    A round calls each run once, so that whatever slows the machine for a while slows all alike. There are as many
    rounds as fit into ``seconds``, from :data:`FEWEST_ROUNDS` to :data:`MOST_ROUNDS`; after ``deadline``, a time of
    :func:`time.monotonic`, none begins but the first. A run for which memory does not suffice has no times.
    """
    stopwatch = _gpu_stopwatch() if device == "cuda" else _cpu_stopwatch
    runs, times, failures = dict(runs), {name: [] for name in runs}, {}
    started, rounds = time.monotonic(), 0
    while runs and rounds < MOST_ROUNDS:
        now = time.monotonic()
        over = now - started >= seconds and rounds >= FEWEST_ROUNDS
        if rounds > 0 and (over or now >= deadline):
            break
        readings = {}
        for name, run in list(runs.items()):
            try:
                readings[name] = stopwatch(run)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failures[name] = f"out of memory: {first_line(error)}"
                del runs[name], times[name]
        for name, milliseconds in readings.items():
            times[name].append(milliseconds())
        rounds += 1
    return times, failures


def _cpu_stopwatch(run: Run) -> Callable[[], float]:
    start = time.perf_counter()
    run()
    milliseconds = 1e3 * (time.perf_counter() - start)
    return lambda: milliseconds


def _gpu_stopwatch() -> Callable[[Run], Callable[[], float]]:
    """Reads only later, so that Python launches the next call while the GPU is still busy."""
    cache = torch.empty(_LARGER_THAN_ANY_CACHE, dtype=torch.int8, device="cuda")

    def stopwatch(run: Run) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cache.zero_()
        start.record()
        run()
        end.record()

        def milliseconds() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return milliseconds

    return stopwatch


def peak_bytes(run: Run, device: str) -> int:
    """The most memory that torch's allocator held at once during ``run()``, above what it held before.

    On a CPU the allocator keeps no peak, but the profiler sees each of its steps, those inside custom operators too.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler greets on stderr
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def available_bytes(device: str) -> int:
    """Memory that can still be allocated."""
    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    limit, used = (_CONTROL_GROUP / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def is_out_of_memory(error: Exception) -> bool:
    """Also on a CPU, where torch has no type for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """The kind of an error and what it says first."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['-'])[0]}"


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
