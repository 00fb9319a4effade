"""A trace of some steps of this rank, for Perfetto, and a table of the operators that take longest."""

from __future__ import annotations

import gzip
import os
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

PHASES = ("data", "forward", "backward", "update")
"""Spans that :class:`dcscale.parallel.step_clock.StepClock` makes in a step."""

TABLE_ROWS = 30
"""Operators, and kernels, in the table."""

_STEP = "ProfilerStep#"
_DEVICE_KINDS = ("kernel", "gpu_memcpy", "gpu_memset")
_HOST_KINDS = ("cpu_op", "user_annotation", "cuda_runtime", "cuda_driver")


class Span(NamedTuple):
    """A part of a trace."""

    name: str
    kind: str
    """As torch calls it: ``cpu_op``, ``user_annotation``, ``kernel``."""

    thread: int
    start: int
    """Nanoseconds."""

    end: int


class StepTrace:
    """Records a trace from :meth:`start` on; there is one at a time in a process.

    Args:
        device: where the model computes.
        options: of ``memory`` (allocations), ``shapes`` (of the inputs of operators) and ``stacks`` (Python frames),
            each of which makes the trace larger and the steps slower.
    """

    suffix = ""

    def __init__(self, device: torch.device, options: Collection[str] = ()):
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # errors only; read when the first trace starts
        activities, self._on_gpu = [ProfilerActivity.CPU], device.type == "cuda"
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
        self._by_shape = "shapes" in options
        self._profile = profile(
            activities=activities,
            record_shapes="shapes" in options,
            profile_memory="memory" in options,
            with_stack="stacks" in options,
        )
        self._step: record_function | None = None

    def start(self) -> None:
        """Starts to record. The first time on a GPU, this takes seconds."""
        self._profile.start()

    def begin_step(self, number: int) -> None:
        """Everything until :meth:`end_step` is shown as this step, by the name that tools look for."""
        self._step = record_function(f"{_STEP}{number}")
        self._step.__enter__()

    def end_step(self) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
            self._step = None

    def stop(self) -> None:
        """Stops to record."""
        self.end_step()
        try:
            if self._on_gpu:  # or kernels that still run would be missing
                torch.cuda.synchronize()
        finally:
            self._profile.stop()

    def write(self, folder: Path, name: str, title: str) -> list[Path]:
        """Writes ``NAME.json.gz`` and ``NAME.txt``, with a title, into a folder; returns their paths.

        Raises:
            OSError: a file cannot be written.
        """
        trace, table = folder / f"{name}.json.gz", folder / f"{name}.txt"
        with tempfile.NamedTemporaryFile(suffix=".json") as exported:
            self._profile.export_chrome_trace(exported.name)
            with open(exported.name, "rb") as source:
                # torch does not notice a full disk.
                source.seek(-min(16, os.path.getsize(exported.name)), os.SEEK_END)
                if not source.read().rstrip().endswith(b"}"):
                    raise OSError(f"the trace could not be written to {tempfile.gettempdir()}: no space left?")
                source.seek(0)
                publish(trace, lambda target: _compress(source, target))
        publish(table, lambda target: target.write(f"{title}\n\n{table_of(list(self._spans()))}\n".encode()))
        return [trace, table]

    def _spans(self) -> Iterator[Span]:
        # key_averages() would take twenty times as long: minutes for a large model.
        for event in self._profile.profiler.kineto_results.events():
            name, kind = event.name(), event.activity_type()
            if kind in _HOST_KINDS + _DEVICE_KINDS and not event.is_async():
                if self._by_shape and (shapes := event.shapes()):
                    name += " " + str(shapes).replace(" ", "")
                yield Span(name, kind, event.start_thread_id(), event.start_ns(), event.end_ns())


def table_of(spans: Collection[Span]) -> str:
    """The time of each step by phase, and what took longest on the host and on the device."""
    host = [span for span in spans if span.kind in _HOST_KINDS]
    steps = sorted((span for span in host if span.name.startswith(_STEP)), key=lambda span: span.start)
    notes = [span for span in host if span.kind == "user_annotation" and span.name in PHASES]
    lines = [f"{'ms of':<10}{'all':>12}" + "".join(f"{phase:>12}" for phase in PHASES)]
    for step in steps:
        inside = [span for span in notes if step.start <= span.start and span.end <= step.end]
        parts = [sum(span.end - span.start for span in inside if span.name == phase) for phase in PHASES]
        times = "".join(f"{time / 1e6:>12,.3f}" for time in [step.end - step.start, *parts])
        lines.append(f"step {step.name.removeprefix(_STEP):<5}{times}")
    device = [span for span in spans if span.kind in _DEVICE_KINDS]
    if device:
        lines += ["", "on the device:", *_top((span.name, span.end - span.start) for span in device)]
    return "\n".join([*lines, "", "on the host, without what is called from within:", *_top(_self_times(host))])


def _self_times(spans: Iterable[Span]) -> Iterator[tuple[str, int]]:
    """Name and time of each span without those that are nested in it, in nanoseconds."""
    open_spans: list[tuple[Span, int]] = []  # with the time of what is nested
    for span in sorted(spans, key=lambda span: (span.thread, span.start, -span.end)):
        while open_spans and (open_spans[-1][0].thread, open_spans[-1][0].end) <= (span.thread, span.start):
            outer, nested = open_spans.pop()
            yield outer.name, outer.end - outer.start - nested
        if open_spans:
            outer, nested = open_spans[-1]
            open_spans[-1] = outer, nested + span.end - span.start
        open_spans.append((span, 0))
    yield from ((outer.name, outer.end - outer.start - nested) for outer, nested in open_spans)


def _top(times: Iterable[tuple[str, int]]) -> list[str]:
    """A table of the names that take longest in sum."""
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, time in times:
        sums[name][0] += time
        sums[name][1] += 1
    total = sum(time for time, _ in sums.values()) or 1
    lines = [f"{'ms':>12}{'share':>8}{'calls':>10}{'us a call':>12}  name"]
    for name, (time, calls) in sorted(sums.items(), key=lambda item: -item[1][0])[:TABLE_ROWS]:
        lines.append(f"{time / 1e6:>12,.3f}{time / total:>8.1%}{calls:>10,}{time / calls / 1e3:>12,.1f}  {name[:120]}")
    return lines


def _compress(source: BinaryIO, target: BinaryIO) -> None:
    with gzip.GzipFile(fileobj=target, mode="wb", compresslevel=4, mtime=0) as compressed:
        shutil.copyfileobj(source, compressed, 1 << 20)


def publish(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file that appears when it is complete. It is not made durable: it tells of the past, nobody resumes it.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        with open(unfinished, "wb") as target:
            write(target)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
