"""Meters of time and memory, for functions and for whole processes.

Of a function: milliseconds by the GPU's events or Python's clock, and peak memory by torch's CUDA allocator or, on a
CPU, its profiler. Of this process: wall time, memory, and CPU time including the processes that it has started.
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

MIN_ROUNDS, MAX_ROUNDS = 3, 50
_CACHE_FLUSH_BYTES = 2**28
"""Larger than any L2 cache: written before each call on a GPU, so that no call finds its input cached."""

CGROUP = Path("/sys/fs/cgroup")
"""Where Linux reports the memory limit of a container."""


def time_in_turns(
    runs: Mapping[Name, Run], device: str, seconds: float, deadline: float, flushes: int = 1
) -> tuple[dict[Name, list[float]], dict[Name, str]]:
    """Time functions in turns: each round calls each of them once, so that temporary slowdowns affect all alike.

    Args:
        runs: the functions by name. Each must have been called before (warmed up).
        device: "cuda" or "cpu".
        seconds: time to spend. There are at least :data:`MIN_ROUNDS` and at most :data:`MAX_ROUNDS` rounds.
        deadline: a time of :func:`time.monotonic` after which no round starts, except for the first.
        flushes: how often L2 is overwritten before each call on a GPU. Each takes it some 0.1 ms; if Python needs less
            than all of them to launch a call, the time is what the GPU alone needs.

    Returns:
        (milliseconds of every call, why a function has no times) by name. Functions that run out of memory have none.
    """
    stopwatch = _gpu_stopwatch(flushes) if device == "cuda" else _cpu_stopwatch
    runs, times, failures = dict(runs), {name: [] for name in runs}, {}
    started, rounds = time.monotonic(), 0
    while runs and rounds < MAX_ROUNDS:
        now = time.monotonic()
        over = now - started >= seconds and rounds >= MIN_ROUNDS
        if rounds > 0 and (over or now >= deadline):
            break
        # Read the clocks after the round: reading a GPU event waits for it.
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


def gpu_clock() -> Callable[[Run], float]:
    """A function that returns how many milliseconds the GPU needs for a single call."""
    stopwatch = _gpu_stopwatch()
    return lambda run: stopwatch(run)()


def _gpu_stopwatch(flushes: int = 1) -> Callable[[Run], Callable[[], float]]:
    """Events are read only later, so that Python launches the next call while the GPU is still busy."""
    cache = torch.empty(_CACHE_FLUSH_BYTES, dtype=torch.int8, device="cuda")

    def stopwatch(run: Run) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
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
    """Peak memory in bytes that torch's allocator held during ``run()``, above what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # The CPU allocator records no peak, but the profiler sees every allocation, those in custom operators too.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no messages of the profiler on stderr
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


def available_bytes(device: str, *, cgroup: Path = CGROUP) -> int:
    """Memory in bytes that can still be allocated.

    Args:
        device: "cuda" or "cpu".
        cgroup: folder with the container's memory limit, if there is one; for "cpu" only.
    """
    if device == "cuda":
        # Free memory of the device, and what torch's allocator caches.
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    limit, used = (cgroup / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        available = min(available, int(limit.read_text()) - int(used.read_text()))
    return available


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out; on a CPU torch raises a plain RuntimeError for it."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def first_line(error: Exception) -> str:
    """The type of an error and the first line of its message."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['-'])[0]}"


_TICKS = os.sysconf("SC_CLK_TCK")


class Reading(NamedTuple):
    """Wall and CPU time in seconds, or their differences between two readings."""

    wall: float
    cpu: float

    def since(self, earlier: Reading) -> Reading:
        """The time between two readings."""
        return Reading(self.wall - earlier.wall, self.cpu - earlier.cpu)


def read() -> Reading:
    """The current reading. CPU seconds include all threads, ended child processes and all living descendants."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = time.process_time() + ended.ru_utime + ended.ru_stime
    return Reading(time.perf_counter(), cpu + sum(_cpu_of(pid) for pid in descendants()))


def memory_bytes(name: str) -> int:
    """Memory of this process in bytes: ``VmRSS`` in use now, ``VmHWM`` at its peak since :func:`reset_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def reset_peak() -> None:
    """Reset the peak of memory to what is in use now."""
    Path("/proc/self/clear_refs").write_text("5")


def descendants() -> list[int]:
    """Process ids of all descendants of this process."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and (fields := _stat(int(folder.name))):
            parents[int(folder.name)] = int(fields[1])
    found, queue = [], [os.getpid()]
    while queue:
        parent = queue.pop()
        children = [pid for pid, its_parent in parents.items() if its_parent == parent]
        found += children
        queue += children
    return found


def _cpu_of(pid: int) -> float:
    fields = _stat(pid)
    # utime, stime, cutime and cstime, in clock ticks
    return sum(map(int, fields[11:15])) / _TICKS if fields else 0.0


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the state on; None if the process has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
