"""Model weights as safetensors shards with an index, in the layout of Hugging Face; read one tensor at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcscale.checkpoint.layout import CheckpointError, join_problems
from dcscale.files import read_json, write_json

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30
"""Default size of a shard, in bytes."""


def save_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes named tensors into ``folder`` as shards and an index. Holds one shard in memory.

    Args:
        weights: name and tensor, consumed one at a time.
        folder: where to write; made if there are tensors.
        shard_bytes: largest size of a shard; a larger tensor is a shard of its own.
    """
    writer = _ShardWriter(folder, shard_bytes)
    for name, tensor in weights:
        writer.add(name, tensor)
    writer.finish()


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Raises what safetensors says of the disk as the OSError that it was."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


class _ShardWriter:
    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_of: dict[str, str] = {}
        # Bytes in the open shard, bytes in finished shards, number of finished shards.
        self._in_shard = self._total = self._written = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self._in_shard + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._shard[name] = tensor
        self._in_shard += tensor.nbytes

    def _flush(self) -> None:
        if not self._shard:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._written += 1
        name = f"model-{self._written:05d}.safetensors"
        with disk_errors(self._folder / name):
            save_file(self._shard, self._folder / name, metadata={"format": "pt"})
        self._shard_of.update(dict.fromkeys(self._shard, name))
        self._total += self._in_shard
        self._shard.clear()
        self._in_shard = 0

    def finish(self) -> None:
        self._flush()
        if self._shard_of:
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": self._shard_of})


def read_index(index: Path) -> dict[str, str]:
    """The file in the same folder that holds each tensor, by the tensor's name.

    Raises:
        CheckpointError: ``index`` cannot be read, is not an index, or names files in other folders.
    """
    file_of = read_json(index, CheckpointError).get("weight_map")
    if not isinstance(file_of, dict):
        raise CheckpointError(f"{index} has a weight_map of type {type(file_of).__name__}, expected names of files")
    for file in file_of.values():
        # A path could name any file on this machine, and the libraries do not take a zero byte.
        if not isinstance(file, str) or Path(file).name != file or not file.isprintable():
            raise CheckpointError(f"{index} names the file {file!r}, but its files must be in the same folder")
    return file_of


class Weights:
    """The tensors in a folder that :func:`save_weights` has written; :meth:`read` loads one at a time.

    Args:
        folder: the folder.
        shapes: shapes of the expected tensors, by name.

    Raises:
        CheckpointError: a file cannot be read, or tensors are missing, unknown or have another shape; lists them.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]]):
        self._folder = folder
        self._shard_of = read_index(folder / INDEX)
        problems = [f"{name} is missing" for name in shapes if name not in self._shard_of]
        problems += [f"{name} is unknown to the model" for name in self._shard_of if name not in shapes]
        by_shard: dict[str, list[str]] = {}
        for name, shard in self._shard_of.items():
            by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            with self._open(shard) as file:
                for name in names:
                    shape, wanted = tuple(file.get_slice(name).get_shape()), tuple(shapes.get(name, ()))
                    if name in shapes and shape != wanted:
                        problems.append(f"{name} has shape {shape}, the model expects {wanted}")
        if problems:
            raise CheckpointError(f"{folder} does not fit the model: {join_problems(problems)}")

    def read(self, name: str) -> Tensor:
        """Loads a tensor to the CPU.

        Raises:
            CheckpointError: its file cannot be read.
        """
        with self._open(self._shard_of[name]) as file:
            return file.get_tensor(name)

    @contextmanager
    def _open(self, shard: str) -> Iterator[safe_open]:
        try:
            with safe_open(self._folder / shard, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"weights in {self._folder} cannot be read: {error}") from error
