"""A model's weights as safetensors shards, written and read one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dcscale.checkpoint.layout import CheckpointError, some_of
from dcscale.files import write_json

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 * 2**30


def save_weights(weights: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Writes named tensors into ``folder`` as shards of at most ``shard_bytes`` (one tensor at least) and an index.

    Holds one shard in memory.
    """
    writer = _ShardWriter(folder, shard_bytes)
    for name, tensor in weights:
        writer.add(name, tensor)
    writer.finish()


class _ShardWriter:
    def __init__(self, folder: Path, shard_bytes: int):
        self._folder, self._shard_bytes = folder, shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_of: dict[str, str] = {}
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
        save_file(self._shard, self._folder / name, metadata={"format": "pt"})
        self._shard_of.update(dict.fromkeys(self._shard, name))
        self._total += self._in_shard
        self._shard.clear()
        self._in_shard = 0

    def finish(self) -> None:
        self._flush()
        if self._shard_of:
            write_json(self._folder / INDEX, {"metadata": {"total_size": self._total}, "weight_map": self._shard_of})


class Weights:
    """The tensors of a folder that :func:`save_weights` has written, read one at a time.

    Args:
        folder: where they lie.
        shapes: of all tensors that must be there, by name.

    Raises:
        CheckpointError: names, shapes or a file do not fit; says which, of many names the first and how many more.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, Sequence[int]]):
        self._folder = folder
        index = folder / INDEX
        try:
            self._shard_of: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}") from error
        problems = [f"{name} is missing" for name in shapes if name not in self._shard_of]
        problems += [f"{name} is unknown to the model" for name in self._shard_of if name not in shapes]
        by_shard: dict[str, list[str]] = {}
        for name, shard in self._shard_of.items():
            if Path(shard).name != shard:
                raise CheckpointError(f"{index} names the file {shard!r} outside its folder")
            by_shard.setdefault(shard, []).append(name)
        for shard, names in by_shard.items():
            with self._open(shard) as file:
                for name in names:
                    shape, wanted = tuple(file.get_slice(name).get_shape()), tuple(shapes.get(name, ()))
                    if name in shapes and shape != wanted:
                        problems.append(f"{name} has shape {shape}, the model wants {wanted}")
        if problems:
            raise CheckpointError(f"{folder} does not fit the model: {some_of(problems)}")

    def read(self, name: str) -> Tensor:
        """A tensor, on the CPU."""
        with self._open(self._shard_of[name]) as file:
            return file.get_tensor(name)

    @contextmanager
    def _open(self, shard: str) -> Iterator[safe_open]:
        try:
            with safe_open(self._folder / shard, framework="pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"weights in {self._folder} cannot be read: {error}") from error
