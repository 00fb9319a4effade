"""Finds out what a folder is from its content, not from its name."""

from __future__ import annotations

from pathlib import Path

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import MARKER, OPTIMIZER, corrupt_reason
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import FORMATS
from dcscale.convert.formats.gguf import is_gguf
from dcscale.convert.tensor_map import Source, read_config_json


def detect(path: Path) -> Source:
    """The model at ``path``: a checkpoint, a run, a model folder, or a folder or file of one of ``FORMATS``.

    Raises:
        ConversionError: no format matches (the message lists what was looked for), or the checkpoint is corrupt.
    """
    if not (path.is_dir() or is_gguf(path)):
        raise ConversionError(
            f"{path} is not a folder: name the folder of a checkpoint, a run or a model, or a .gguf file"
        )
    for detect_format in (_detect_dcscale, *(format.detect for format in FORMATS)):
        if (source := detect_format(path)) is not None:
            return source
    own = f"{MARKER} (a dcscale checkpoint or model folder), checkpoints/step-XXXXXXXX (a dcscale run)"
    looked_for = "; ".join([own, *(format.looks_for for format in FORMATS)])
    if (path / "config.json").is_file():
        model_type = read_config_json(path).get("model_type")
        raise ConversionError(
            f"{path / 'config.json'} has model_type {model_type!r}, which cannot be converted: looked for {looked_for}"
        )
    raise ConversionError(f"{path} is not a model that can be converted: looked for {looked_for}")


def _detect_dcscale(path: Path) -> Source | None:
    """A checkpoint, the newest complete one of a run, or a model folder; its files are checked."""
    if not ((path / MARKER).exists() or checkpoints_of(path) or path.name.startswith("step-")):
        return None
    try:
        folder = find_checkpoint(path)
    except CheckpointError as error:
        raise ConversionError(str(error)) from error
    # The optimizer's files are by far the largest, and not read here.
    if problem := corrupt_reason(folder, skip=OPTIMIZER):
        raise ConversionError(f"the checkpoint is corrupt: {problem}; name another one")
    kind = "training checkpoint" if (folder / OPTIMIZER).is_dir() else "model folder"
    return Source("dcscale", folder, f"dcscale {kind} {folder}")
