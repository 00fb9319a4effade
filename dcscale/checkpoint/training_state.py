"""The training state on disk, free of ranks: each rank's fragments in a file of its own, read by any number of ranks.

``rank-00000.safetensors`` holds one float32 vector for every range of elements of a parameter that rank 0 had, under
the key ``PARAMETER:KIND:START`` (see :mod:`dcscale.parallel.zero_state`). Its metadata hold, as JSON under ``state``,
what is the same in all files: format, counts of ranks and of optimizer steps, and the shapes of all parameters.
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

from dcscale.checkpoint.layout import CheckpointError, some_of
from dcscale.files import sync_folder
from dcscale.parallel import KINDS, MASTER, Snapshot

FORMAT = 1


class _Range(NamedTuple):
    """Elements ``start`` to ``stop`` of the flattened parameter, under ``key`` in a file."""

    start: int
    stop: int
    key: str
    file: Path


def file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write_fragments(snapshot: Snapshot, folder: Path) -> Path:
    """Writes one rank's part into ``folder``, straight from the snapshot's memory, and makes the file durable.

    Returns the file.
    """
    state = {"format": FORMAT, "ranks": snapshot.ranks, "steps": snapshot.steps, "parameters": snapshot.shapes}
    tensors = {f"{name}:{kind}:{start}": tensor for (name, kind, start), tensor in snapshot.tensors.items()}
    path = folder / file_name(snapshot.rank)
    save_file(tensors, path, metadata={"state": json.dumps(state)})
    sync_folder(path)
    return path


class Fragments:
    """A written state of which the headers have been read and fit: every element is there once. Loads no tensor yet.

    Raises:
        CheckpointError: a file is missing, unreadable or of another state, or elements are missing, unknown or there
            twice; says which.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        first = folder / file_name(0)
        with _opened(first) as file:
            said = (file.metadata() or {}).get("state", "")
        self.ranks, self.steps, self.shapes = _parse_state(said, first)
        """Counts of the ranks that wrote it and of optimizer steps; shapes of all parameters by name."""
        found = sorted(path.name for path in folder.iterdir())
        if len(found) != self.ranks or found != [file_name(rank) for rank in range(self.ranks)]:
            raise CheckpointError(
                f"{folder} must hold the files of {self.ranks} ranks, {first.name} to {file_name(self.ranks - 1)}, but "
                f"holds {len(found)}: {some_of(found)}"
            )
        self._ranges: dict[tuple[str, str], list[_Range]] = {(n, kind): [] for n in self.shapes for kind in KINDS}
        for name in found:
            self._read_header(folder / name, said)
        self._check_coverage()

    def _read_header(self, path: Path, said: str) -> None:
        with _opened(path) as file:
            if (file.metadata() or {}).get("state") != said:
                raise CheckpointError(f"{path} is of another training state than {file_name(0)} beside it")
            for key in file.keys():  # noqa: SIM118 (it is no mapping)
                parameter, kind, start = _parse_key(key, path)
                stored = file.get_slice(key)
                shape, dtype = stored.get_shape(), stored.get_dtype()
                if len(shape) != 1 or dtype != "F32":
                    raise CheckpointError(f"{path}: {key} must be a vector of F32, but has shape {shape} of {dtype}")
                if (parameter, kind) not in self._ranges:
                    raise CheckpointError(f"{path}: {key} is of no parameter and kind that the state has")
                self._ranges[parameter, kind].append(_Range(start, start + shape[0], key, path))

    def _check_coverage(self) -> None:
        problems = []
        for (parameter, kind), ranges in self._ranges.items():
            ranges.sort()
            done, size = 0, math.prod(self.shapes[parameter])
            for piece in ranges:
                if piece.start > done:
                    problems.append(f"{kind} of {parameter} lacks elements {done} to {piece.start - 1}")
                elif piece.start < done:
                    problems.append(f"{kind} of {parameter} has element {piece.start} again in {piece.file.name}")
                done = max(done, piece.stop)
            if done < size:
                problems.append(f"{kind} of {parameter} lacks elements {done} to {size - 1}")
            elif done > size:
                problems.append(
                    f"{kind} of {parameter} has elements up to {done - 1}, but the parameter ends at {size - 1}"
                )
        self._refuse(problems, "is no whole training state")

    def _refuse(self, problems: list[str], verdict: str) -> None:
        if problems:
            raise CheckpointError(f"{self._folder} {verdict}: {some_of(problems)}")

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Checks that the state is of a model with these parameters.

        Raises:
            CheckpointError: a parameter is missing, unknown, or has another shape; names them.
        """
        problems = [f"{name} is missing" for name in shapes if name not in self.shapes]
        for name, shape in self.shapes.items():
            if name not in shapes:
                problems.append(f"{name} is unknown to the model")
            elif shape != tuple(shapes[name]):
                problems.append(f"{name} has shape {shape}, the model wants {tuple(shapes[name])}")
        self._refuse(problems, "does not fit the model")

    def weights(self, dtype: torch.dtype, batch_bytes: int = 1 << 30) -> Iterator[tuple[str, Tensor]]:
        """Every parameter by name, its float32 weights rounded to ``dtype``. Reads about ``batch_bytes`` at once.

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
        """Copies into each target what the state has of (parameter, kind), from the given first element on.

        Reads only the ranges that overlap, each file once.

        Raises:
            CheckpointError: a file cannot be read.
        """
        by_file: dict[Path, list[tuple[_Range, int, Tensor]]] = {}
        for place, (first, target) in targets.items():
            for piece in self._ranges[place]:
                if piece.start < first + target.numel() and piece.stop > first:
                    by_file.setdefault(piece.file, []).append((piece, first, target))
        for path, copies in by_file.items():
            with _opened(path) as file:
                for piece, first, target in copies:
                    start, stop = max(piece.start, first), min(piece.stop, first + target.numel())
                    part = file.get_slice(piece.key)[start - piece.start : stop - piece.start]
                    target[start - first : stop - first].copy_(part)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _parse_state(text: str, path: Path) -> tuple[int, int, dict[str, tuple[int, ...]]]:
    """Ranks, steps and shapes."""
    try:
        state = json.loads(text)
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {state['format']!r}, this version of dcscale reads {FORMAT}")
        shapes = {name: tuple(map(int, shape)) for name, shape in state["parameters"].items()}
        return int(state["ranks"]), int(state["steps"]), shapes
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} does not say of which training state it is a part: {error!r}") from error


def _parse_key(key: str, path: Path) -> tuple[str, str, int]:
    parameter, kind, start = ["", "", *key.rsplit(":", 2)][-3:]
    if not start.isdecimal():
        raise CheckpointError(f"{path}: {key!r} must be PARAMETER:KIND:START")
    return parameter, kind, int(start)
