"""The optimizer state on disk, independent of topology: one file per writing rank, read by any number of ranks.

``rank-00000.safetensors`` holds the fragments of rank 0 (see :mod:`dcscale.parallel.zero_state`): one float32 vector
for each range of elements of a parameter, under the key ``PARAMETER:KIND:START``. KIND is ``master``, ``exp_avg`` or
``exp_avg_sq``; START is the first element's index in the flattened parameter. The file's metadata hold, as JSON under
``state``, what all files have in common: format, numbers of ranks and of optimizer steps, shapes of all parameters.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcscale.checkpoint.layout import CheckpointError, join_problems
from dcscale.checkpoint.weights import disk_errors
from dcscale.files import parse_json, sync_folder
from dcscale.parallel import KINDS, MASTER, Snapshot

FORMAT = 1
"""Format of the files."""


class _Range(NamedTuple):
    """Elements ``start`` to ``stop`` (exclusive) of a flattened parameter, stored under ``key`` in ``file``."""

    start: int
    stop: int
    key: str
    file: Path


def file_name(rank: int) -> str:
    """Name of the file that a rank writes."""
    return f"rank-{rank:05d}.safetensors"


def write_fragments(snapshot: Snapshot, folder: Path) -> Path:
    """Writes one rank's part into ``folder``, without a further copy in memory, and makes the file durable.

    Returns:
        Path of the file.
    """
    state = {"format": FORMAT, "ranks": snapshot.ranks, "steps": snapshot.steps, "parameters": snapshot.shapes}
    tensors = {f"{name}:{kind}:{start}": tensor for (name, kind, start), tensor in snapshot.tensors.items()}
    path = folder / file_name(snapshot.rank)
    with disk_errors(path):
        save_file(tensors, path, metadata={"state": json.dumps(state)})
    sync_folder(path)
    return path


class TrainingStateReader:
    """Reads a saved optimizer state. Opening it reads headers only and checks that every element is there exactly once.

    Implements :class:`dcscale.parallel.zero_state.SavedState`.

    Args:
        folder: folder with the files of all ranks that wrote the state.

    Raises:
        CheckpointError: a file is missing, unreadable or of another state; elements are missing, duplicate or unknown.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        first = folder / file_name(0)
        with _opened(first) as file:
            metadata = (file.metadata() or {}).get("state", "")
        self.ranks, self.steps, self.shapes = _parse_metadata(metadata, first)
        """Number of ranks that wrote it, number of optimizer steps, and shapes of all parameters by name."""
        found = sorted(path.name for path in folder.iterdir())
        if len(found) != self.ranks or found != [file_name(rank) for rank in range(self.ranks)]:
            raise CheckpointError(
                f"{folder} must hold the files of {self.ranks} ranks, {first.name} to {file_name(self.ranks - 1)}, but "
                f"holds {len(found)}: {join_problems(found)}"
            )
        self._ranges: dict[tuple[str, str], list[_Range]] = {(n, kind): [] for n in self.shapes for kind in KINDS}
        for name in found:
            self._read_header(folder / name, metadata)
        self._check_coverage()

    def _read_header(self, path: Path, metadata: str) -> None:
        with _opened(path) as file:
            if (file.metadata() or {}).get("state") != metadata:
                raise CheckpointError(f"{path} is of another training state than {file_name(0)} in the same folder")
            for key in file.keys():  # noqa: SIM118 (safe_open is not a mapping)
                parameter, kind, start = _parse_key(key, path)
                stored = file.get_slice(key)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                if len(shape) != 1 or dtype != "F32":
                    raise CheckpointError(f"{path}: {key} must be a vector of F32, but has shape {shape} of {dtype}")
                if (parameter, kind) not in self._ranges:
                    raise CheckpointError(f"{path}: {key} names no parameter and kind of the state")
                self._ranges[parameter, kind].append(_Range(start, start + shape[0], key, path))

    def _check_coverage(self) -> None:
        """Checks that the sorted ranges of each parameter join without gap or overlap from 0 to its size."""
        problems = []
        for (parameter, kind), ranges in self._ranges.items():
            ranges.sort()
            covered, size = 0, math.prod(self.shapes[parameter])
            for part in ranges:
                if part.start > covered:
                    problems.append(f"{kind} of {parameter} lacks elements {covered} to {part.start - 1}")
                elif part.start < covered:
                    problems.append(f"{kind} of {parameter} has element {part.start} again in {part.file.name}")
                covered = max(covered, part.stop)
            if covered < size:
                problems.append(f"{kind} of {parameter} lacks elements {covered} to {size - 1}")
            elif covered > size:
                problems.append(
                    f"{kind} of {parameter} has elements up to {covered - 1}, but the parameter ends at {size - 1}"
                )
        self._raise_if(problems, "is not a complete training state")

    def _raise_if(self, problems: list[str], verdict: str) -> None:
        if problems:
            raise CheckpointError(f"{self._folder} {verdict}: {join_problems(problems)}")

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the state belongs to a model with these parameters.

        Raises:
            CheckpointError: parameters are missing, unknown or have another shape; lists them.
        """
        problems = [f"{name} is missing" for name in shapes if name not in self.shapes]
        for name, shape in self.shapes.items():
            if name not in shapes:
                problems.append(f"{name} is unknown to the model")
            elif shape != tuple(shapes[name]):
                problems.append(f"{name} has shape {shape}, the model expects {tuple(shapes[name])}")
        self._raise_if(problems, "does not fit the model")

    def weights(self, dtype: torch.dtype, batch_bytes: int = 1 << 30) -> Iterator[tuple[str, Tensor]]:
        """Yields name and weights of every parameter, converted from float32 to ``dtype``.

        Reads parameters in batches of about ``batch_bytes`` bytes of float32, so that each file is opened few times.

        Raises:
            CheckpointError: a file cannot be read.
        """
        batch: dict[str, Tensor] = {}
        for name, shape in self.shapes.items():
            batch[name] = torch.empty(shape)
            if sum(tensor.nbytes for tensor in batch.values()) >= batch_bytes:
                yield from self._filled(batch, dtype)
        yield from self._filled(batch, dtype)

    def _filled(self, batch: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        self.fill({(name, MASTER): (0, tensor.view(-1)) for name, tensor in batch.items()})
        for name in list(batch):
            yield name, batch.pop(name).to(dtype)

    def fill(self, targets: Mapping[tuple[str, str], tuple[int, Tensor]]) -> None:
        """Copies saved elements into ``targets``.

        Reads only the ranges that overlap with a target, and opens each file once.

        Args:
            targets: (parameter, kind) -> (index of the first element in the flattened parameter, float32 [elements] to
                fill).

        Raises:
            CheckpointError: a file cannot be read.
        """
        by_file: dict[Path, list[tuple[_Range, int, Tensor]]] = {}
        for (parameter, kind), (first, target) in targets.items():
            for part in self._ranges[parameter, kind]:
                if part.start < first + target.numel() and part.stop > first:
                    by_file.setdefault(part.file, []).append((part, first, target))
        for path, copies in by_file.items():
            with _opened(path) as file:
                for part, first, target in copies:
                    # The overlap of range and target, as elements of the flattened parameter.
                    start, stop = max(part.start, first), min(part.stop, first + target.numel())
                    values = file.get_slice(part.key)[start - part.start : stop - part.start]
                    target[start - first : stop - first].copy_(values)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse_metadata(text: str, path: Path) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """(ranks, steps, shapes by parameter)"""
    try:
        state = parse_json(text, path)
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {state['format']!r}, this version of dcscale reads {FORMAT}")
        shapes = {name: tuple(map(int, shape)) for name, shape in state["parameters"].items()}
        return int(state["ranks"]), int(state["steps"]), shapes
    except (ValueError, OverflowError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} has no valid metadata of a training state: {error!r}") from error


def _parse_key(key: str, path: Path) -> tuple[str, str, int]:
    """(parameter, kind, start)"""
    parameter, kind, start = ["", "", *key.rsplit(":", 2)][-3:]
    if not start.isdecimal():
        raise CheckpointError(f"{path}: {key!r} must be PARAMETER:KIND:START")
    return parameter, kind, int(start)
