"""What takes memory in a step: a snapshot of the allocator of a GPU, or Python's allocations; and the live tensors."""

from __future__ import annotations

import gc
import pickle
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dcscale.observe.traces import publish

TOP = 30
"""Lines in each table."""

MOST_CUDA_EVENTS = 100_000
"""Allocations and frees of a step in a snapshot; of more, the last ones."""


class MemoryLook:
    """Looks at the memory of this process from :meth:`start` to :meth:`stop`.

    On a GPU all allocations are recorded, with Python stacks, for https://pytorch.org/memory_viz. (Not run on a GPU
    yet.) On a CPU ``tracemalloc`` finds what Python has allocated, which does not include the data of tensors.

    Args:
        device: where the model computes.
    """

    suffix = "-memory"

    def __init__(self, device: torch.device):
        self._device = device
        self._was_tracing = False
        self._sections: list[str] = []
        self._before = ""
        self._snapshot: dict[str, Any] | None = None

    def start(self) -> None:
        """Starts to record, which makes the step slower."""
        self._before = resident()
        if self._device.type == "cuda":
            torch.cuda.memory._record_memory_history(stacks="python", max_entries=MOST_CUDA_EVENTS)
            return
        self._was_tracing = tracemalloc.is_tracing()
        if not self._was_tracing:
            tracemalloc.start()

    def begin_step(self, number: int) -> None:
        """Nothing; as of :class:`dcscale.observe.traces.StepTrace`."""

    def end_step(self) -> None:
        """Nothing, as well."""

    def stop(self) -> None:
        """Stops to record, and makes the tables."""
        sections = [f"before the step: {self._before}\nafter the step:  {resident()}"]
        if self._device.type == "cuda":
            try:
                self._snapshot = torch.cuda.memory._snapshot()
            finally:
                torch.cuda.memory._record_memory_history(enabled=None)
            sections.append(torch.cuda.memory_summary(self._device))
        else:
            try:
                sections.append(_python_table())
            finally:
                if not self._was_tracing:
                    tracemalloc.stop()
        self._sections = [*sections, tensor_table()]

    def write(self, folder: Path, name: str, title: str) -> list[Path]:
        """Writes ``NAME.txt``, and on a GPU ``NAME.pickle``, into a folder; returns their paths.

        Raises:
            OSError: a file cannot be written.
        """
        text = "\n\n".join([title, *self._sections]) + "\n"
        paths = [folder / f"{name}.txt"]
        publish(paths[0], lambda target: target.write(text.encode()))
        if self._snapshot is not None:
            paths.append(folder / f"{name}.pickle")
            publish(paths[1], lambda target: pickle.dump(self._snapshot, target))
        return paths


def resident() -> str:
    """Resident memory of this process, now and at its peak, as the system says."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:  # not a Linux
        return "resident memory is not known"
    kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if name[:2] == "Vm"}
    return f"{kib['VmRSS'] / 2**10:,.1f} MiB resident, {kib['VmHWM'] / 2**10:,.1f} MiB at the peak so far"


def _python_table() -> str:
    current, peak = tracemalloc.get_traced_memory()
    snapshot = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(False, tracemalloc.__file__)])
    lines = [
        f"Python's allocations in the step (without the data of tensors): {current / 2**20:,.2f} MiB are left, "
        f"{peak / 2**20:,.2f} MiB at the peak; by the line that made them:",
        f"{'KiB':>12} {'count':>9}  line",
    ]
    for entry in snapshot.statistics("lineno")[:TOP]:
        frame = entry.traceback[0]
        lines.append(f"{entry.size / 2**10:>12,.1f} {entry.count:>9,}  {frame.filename}:{frame.lineno}")
    return "\n".join(lines)


def live_tensors() -> Iterator[torch.Tensor]:
    """The tensors that Python knows of; not those that only autograd holds."""
    for value in gc.get_objects():
        if issubclass(type(value), torch.Tensor):  # isinstance would run code of proxies
            yield value


def tensor_table() -> str:
    """The live tensors, by shape, the largest in sum first."""
    counts: Counter[tuple[tuple[int, ...], torch.dtype, torch.device]] = Counter()
    storages: dict[tuple[torch.device, int], int] = {}
    for tensor in live_tensors():
        # The storage of a fake tensor, as of torch.compile, is on the meta device, whatever the tensor says.
        if tensor.layout is torch.strided and (storage := tensor.untyped_storage()).device.type != "meta":
            counts[tuple(tensor.shape), tensor.dtype, tensor.device] += 1
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    sizes = {key: count * torch.Size(key[0]).numel() * key[1].itemsize for key, count in counts.items()}
    lines = [
        f"live tensors that Python knows of: {sum(counts.values()):,}, in {len(storages):,} storages of "
        f"{sum(storages.values()) / 2**20:,.1f} MiB; by shape (views count like others):",
        f"{'MiB':>12} {'count':>9}  shape",
    ]
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True)[:TOP]:
        shape, dtype, device = key
        lines.append(f"{sizes[key] / 2**20:>12,.2f} {counts[key]:>9,}  {list(shape)} {str(dtype)[6:]} on {device}")
    return "\n".join(lines)
