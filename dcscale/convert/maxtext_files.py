"""The parameters in an Orbax checkpoint, read one layer at a time by tensorstore: JAX and Orbax are not needed.

Orbax stores a tree of arrays in zarr, by the names of the tree joined by dots: each array in a folder of its own, as
upstream's code does (``use_ocdbt=False``), or all in one OCDBT database, as Orbax does by default.

Upstream is MaxText with DCFormer's layers (Caiyun-AI/DCFormer, jax/). Layers that were scanned over are one array with
an axis of layers, ``decoder.layers.X``; others have a number, ``decoder.layers_3.X``. Here both are called
``decoder.layers.3.X``.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dcscale.convert.errors import ConversionError
from dcscale.convert.tensors import TensorFiles

OCDBT = "manifest.ocdbt"
_ITEMS = ("state", "default")
"""Names that MaxText gives to what a step's folder holds."""

_MOST_LAYERS = 1000
_PARAMETERS = re.compile(r"params\.(?:params\.)?((?:token_embedder|decoder)\..+)")
_SCANNED, _NUMBERED = re.compile(r"decoder\.layers\.(.+)"), re.compile(r"decoder\.layers_(\d+)\.(.+)")


def find_state(path: Path) -> Path | None:
    """The folder with the arrays that ``path`` means: itself, the one in a step's folder, or that of the newest step
    of a run or of its ``checkpoints``; None where there is none."""
    for folder in (path, *(path / item for item in _ITEMS)):
        if (folder / OCDBT).is_file() or next(folder.glob("params.*/.zarray"), None) is not None:
            return folder
    for folder in (path, path / "checkpoints"):
        steps = (step for step in folder.glob("*") if step.name.isdecimal() and step.is_dir())
        for step in sorted(steps, key=lambda step: int(step.name), reverse=True):
            if (state := find_state(step)) is not None:
                return state
    return None


class MaxTextFiles(TensorFiles):
    """Arrays of the tree ``params``. Others, such as the optimizer's, are not read: ``others`` has their names.

    Args:
        state: from :func:`find_state`.
        scan_axis: the axis of layers in arrays of scanned layers.

    Raises:
        ConversionError: tensorstore is missing, or a file is damaged.
    """

    def __init__(self, state: Path, scan_axis: int):
        super().__init__(state)
        try:
            import tensorstore
        except ImportError as error:
            raise ConversionError(
                f"{state} is an Orbax checkpoint, which needs the tensorstore package: pip install tensorstore"
            ) from error
        self._library, self._scan_axis = tensorstore, scan_axis
        self._store: dict[str, Any] = {"driver": "file", "path": f"{state.resolve()}/"}
        if (state / OCDBT).is_file():
            self._store = {"driver": "ocdbt", "base": self._store}
        self._place: dict[str, tuple[str, int | None]] = {}
        """Of every tensor, its array, and its index on the axis of layers."""
        self._open: dict[str, Any] = {}
        self.others: list[str] = []
        for array in self._arrays():
            if match := _PARAMETERS.fullmatch(array):
                self._add_array(array, match[1])
            else:
                self.others.append(array)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> Tensor:
        array, layer = self._place[name]
        part = self._open[array]
        if layer is not None:
            part = part[(slice(None),) * self._scan_axis + (layer,)]
        if rows is not None:
            part = part[rows[0] : rows[1]]
        try:
            values = part.read().result()
        except ValueError as error:
            raise ConversionError(f"{array} in {self.source} cannot be read: {_first_line(error)}") from error
        if self.dtypes[name] == torch.bfloat16:  # which numpy does not have
            return torch.from_numpy(values.view("uint16").copy()).view(torch.bfloat16)
        return torch.from_numpy(values.copy())

    def _arrays(self) -> list[str]:
        store = self._library.KvStore.open(self._store).result()
        try:
            keys = [key.decode(errors="replace") for key in store.list().result()]
        except ValueError as error:
            raise ConversionError(f"{self.source} cannot be read: {_first_line(error)}") from error
        later = [key for key in keys if key.endswith("/zarr.json")]
        if later:
            raise ConversionError(f"{self.source} is in zarr's format 3 ({later[0]}): only format 2 is read")
        return sorted(key.removesuffix("/.zarray") for key in keys if key.endswith("/.zarray"))

    def _add_array(self, array: str, name: str) -> None:
        # A chunk that is missing would be read as zeros.
        spec = {"driver": "zarr", "kvstore": {**self._store, "path": ""}, "fill_missing_data_reads": False}
        if self._store["driver"] == "ocdbt":
            spec["kvstore"]["path"] = f"{array}/"
        else:
            spec["kvstore"]["path"] = f"{self._store['path']}{array}/"
        try:
            opened = self._library.open(spec, read=True, open=True).result()
        except ValueError as error:
            raise ConversionError(f"{array} in {self.source} cannot be read: {_first_line(error)}") from error
        dtype = getattr(torch, opened.dtype.name, None)
        if not isinstance(dtype, torch.dtype):
            raise ConversionError(f"{array} in {self.source} has the type {opened.dtype.name}, which torch has not")
        shape = tuple(opened.shape)
        self._open[array] = opened
        if match := _NUMBERED.fullmatch(name):
            self._register(f"decoder.layers.{int(match[1])}.{match[2]}", shape, dtype, array, None)
        elif match := _SCANNED.fullmatch(name):
            axis = self._scan_axis
            if axis >= len(shape):
                raise ConversionError(
                    f"{array} in {self.source} has shape {list(shape)}, without the axis {axis} of scanned layers"
                )
            if shape[axis] > _MOST_LAYERS:
                raise ConversionError(
                    f"{array} in {self.source} has shape {list(shape)}, with more than {_MOST_LAYERS} layers on axis "
                    f"{axis}: is that param_scan_axis?"
                )
            for layer in range(shape[axis]):
                rest = (*shape[:axis], *shape[axis + 1 :])
                self._register(f"decoder.layers.{layer}.{match[1]}", rest, dtype, array, layer)
        else:
            self._register(name, shape, dtype, array, None)

    def _register(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, array: str, layer: int | None) -> None:
        self._add(name, shape, dtype)
        self._place[name] = array, layer


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
