"""Reads the tensors of a folder one at a time: safetensors, or PyTorch's .bin without running any code in it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.weights import INDEX, read_index
from dcscale.convert.errors import ConversionError

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types that weights may have in a file."""

NAMES = (INDEX, "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")
"""Files with a folder's tensors or their index. The first that exists is read, as transformers does."""


class TensorFiles(ABC):
    """Named tensors in one or several files; none is kept in memory.

    Attributes:
        source: the file with the tensors, or their index.
        shapes: of every tensor, by name.
        dtypes: of every tensor, by name.
        shared: groups of names that share memory in the file.
    """

    def __init__(self, source: Path):
        self.source = source
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.shared: list[list[str]] = []

    @abstractmethod
    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        """A tensor, or its rows from the first to before the second of ``rows``, in new memory.

        Raises:
            ConversionError: the file cannot be read.
        """

    def _add(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if name in self.shapes:
            raise ConversionError(f"{self.source}: the tensor {name} is in two of its files; remove one")
        self.shapes[name], self.dtypes[name] = shape, dtype


class _Safetensors(TensorFiles):
    def __init__(self, source: Path, files: list[Path]):
        super().__init__(source)
        self._file_of: dict[str, Path] = {}
        for path in files:
            try:
                with safe_open(path, framework="pt") as file:
                    for name in file.keys():  # noqa: SIM118 - the file is not a mapping
                        part = file.get_slice(name)
                        # get_slice has no dtype in torch's terms, but an empty slice does. A scalar has no slices.
                        dtype = part[:0].dtype if part.get_shape() else file.get_tensor(name).dtype
                        self._add(name, tuple(part.get_shape()), dtype)
                        self._file_of[name] = path
            except (OSError, SafetensorError) as error:
                raise ConversionError(f"{path} cannot be read as safetensors: {error}") from error

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        try:
            with safe_open(self._file_of[name], framework="pt") as file:
                return file.get_tensor(name) if rows is None else file.get_slice(name)[rows[0] : rows[1]]
        except (OSError, SafetensorError) as error:
            raise ConversionError(f"{name} in {self._file_of[name]} cannot be read: {error}") from error


class _TorchFiles(TensorFiles):
    """Files of torch.save, mapped into memory: only the pages of tensors that are read are loaded."""

    def __init__(self, source: Path, files: list[Path]):
        super().__init__(source)
        self._tensors: dict[str, Tensor] = {}
        by_memory: dict[int, list[str]] = {}
        for path in files:
            try:
                # weights_only: a pickle can run any code when it is loaded.
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception as error:  # a malformed pickle raises almost any
                reason = (str(error) or repr(error)).splitlines()[0]
                raise ConversionError(
                    f"{path} cannot be read: {reason} It must be a file of named tensors, written by torch.save of "
                    "PyTorch 1.6 or newer; nothing else is unpickled"
                ) from error
            if not isinstance(content, dict):
                raise ConversionError(f"{path} has a {type(content).__name__}, expected a dictionary of tensors")
            for name, tensor in content.items():
                if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
                    raise ConversionError(
                        f"{path}: {name!r} is a {type(tensor).__name__}, expected named dense tensors"
                    )
                if tensor.is_meta or _overlaps_itself(tensor):
                    raise ConversionError(
                        f"{path}: {name} has fewer values than its shape {list(tensor.shape)} (strides "
                        f"{list(tensor.stride())}): save it again with .contiguous()"
                    )
                self._add(name, tuple(tensor.shape), tensor.dtype)
                self._tensors[name] = tensor
                by_memory.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        self.shared = [names for names in by_memory.values() if len(names) > 1]

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self._tensors[name].detach()
        return (tensor if rows is None else tensor[rows[0] : rows[1]]).clone(memory_format=torch.contiguous_format)


def _overlaps_itself(tensor: Tensor) -> bool:
    """Whether elements share memory, as in the result of ``expand``: a small file could ask for any amount of it."""
    last = 0  # place of the last element in the dimensions with smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1:
            if stride <= last:
                return True
            last += stride * (size - 1)
    return False


def open_tensors(folder: Path) -> TensorFiles:
    """The tensors of ``folder``.

    Raises:
        ConversionError: there are none, or a file is missing, corrupt, or has anything but named tensors.
    """
    source = next((folder / name for name in NAMES if (folder / name).is_file()), None)
    if source is None:
        raise ConversionError(f"{folder} has no weights: looked for {', '.join(NAMES)}")
    files = [source]
    if source.name.endswith(".index.json"):
        try:
            files = [folder / name for name in sorted(set(read_index(source).values()))]
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
    return (_TorchFiles if ".bin" in source.name else _Safetensors)(source, files)
