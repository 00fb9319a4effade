"""Where a checkpoint's parts lie, and which checkpoints of a run are whole.

RUN/checkpoints/
  latest                     name of the newest checkpoint
  step-00000100/
    COMPLETE                 written last: {"format", "files": {name: {"bytes", "sha256"}}}
    state.json               step, tokens, data position, validation loss, hooks' states, versions, git revision: see
                             dcscale.train.state
    config.yaml              the resolved config
    tokenizer.json           the tokenizer, where it is not the bytes
    optimizer/               float32 weights and the optimizer's moments, each rank its part: see
                             dcscale.checkpoint.fragments
    weights/                 the model alone: safetensors shards and their index
    probe.safetensors        a few tokens and the logits the model made of them: see dcscale.checkpoint.probe

No random states are in it, because training draws from no generator that has one: initial weights, the data's order and
samples are functions of the seed, a name and a number, and the model has no dropout.

A *model folder*, as tools/convert_checkpoint.py writes it, is the same without optimizer/ and
probe.safetensors, under any name.

What a checkpoint's config and state say.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from dcscale.config import Config, ConfigError, load_config
from dcscale.files import sha256_of, write_json

FORMAT = 2
"""Of the marker."""
FORMAT_OF_SIZES = 1
"""Of markers from before there were checksums; they are still read."""
STATE_FORMAT = 1
MARKER = "COMPLETE"
STATE, CONFIG, OPTIMIZER, WEIGHTS, LATEST = "state.json", "config.yaml", "optimizer", "weights", "latest"
PROBE = "probe.safetensors"
OLD_OPTIMIZER = "deepspeed"
"""Where checkpoints once had pickles of DeepSpeed in place of ``OPTIMIZER``: they are not loaded any more."""
TEMPORARY_PREFIX = ".unfinished-"
"""Of a folder that is being written, or removed."""
NAMED_AT_MOST = 8
"""Problems that an error names; the others are counted."""
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, or used for this run."""


def some_of(problems: list[str]) -> str:
    """The first problems in words, and how many more there are."""
    more = len(problems) - NAMED_AT_MOST
    return "; ".join(problems[:NAMED_AT_MOST]) + (f"; and {more} more" if more > 0 else "")


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint: expected step-XXXXXXXX")
    return int(match[1])


class Written(NamedTuple):
    """What the marker says of a file."""

    bytes: int
    sha256: str | None
    """None in checkpoints of format 1, which had sizes only."""


def written(folder: Path, names: Iterable[str]) -> dict[str, Written]:
    """Sizes and checksums of files in ``folder``, for :func:`seal`; reads them."""
    return {name: Written((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}


def files_in(folder: Path) -> list[str]:
    """The names of all files below ``folder``, relative to it."""
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def seal(folder: Path, files: Mapping[str, Written] | None = None) -> None:
    """Writes the marker: with it, the folder is a whole checkpoint. Without ``files``, reads all that are there."""
    if files is None:
        files = written(folder, (name for name in files_in(folder) if name != MARKER))
    write_json(folder / MARKER, {"format": FORMAT, "files": {name: file._asdict() for name, file in files.items()}})


def read_marker(folder: Path) -> dict[str, Written]:
    """The files of a checkpoint, by name.

    Raises:
        CheckpointError: there is no marker, or it is not what :func:`seal` writes.
    """
    marker = folder / MARKER
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{marker} is missing: the checkpoint was not finished") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{marker} is not readable: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{marker} must be a JSON object, but is a {type(content).__name__}")
    if content.get("format") not in (FORMAT, FORMAT_OF_SIZES):
        found = content.get("format")
        raise CheckpointError(
            f"{marker} has format {found!r}, this version of dcscale reads {FORMAT_OF_SIZES} and {FORMAT}"
        )
    files = content.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{marker} has files {files!r}, but must map the files' names to what was written")
    return {name: _parse_written(marker, name, entry) for name, entry in files.items()}


def _parse_written(marker: Path, name: str, entry: Any) -> Written:
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise CheckpointError(f"{marker} names the file {name!r} outside its folder")
    if isinstance(entry, int):
        return Written(entry, None)
    try:
        return Written(int(entry["bytes"]), str(entry["sha256"]))
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{marker} must say bytes and sha256 of {name}, but says {entry!r}") from None


def incomplete_reason(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None if it is one. Compares sizes, not contents."""
    try:
        files = read_marker(folder)
    except CheckpointError as error:
        return str(error)
    for name, file in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != file.bytes:
            return f"{path} has {path.stat().st_size} bytes, {file.bytes} were written"
    return None


def corrupt_reason(folder: Path, left_out: str = "", rank: int = 0, ranks: int = 1) -> str | None:
    """What is wrong with ``folder``, or None: as :func:`defect`, and by the checksums of one rank's share of the files.

    ``left_out`` is a part of the checkpoint of which only sizes are compared, such as ``WEIGHTS``.
    """
    problem = incomplete_reason(folder)
    if problem is not None:
        return problem
    files = {name: file for name, file in read_marker(folder).items() if PurePath(name).parts[0] != left_out}
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))  # so that the shares are about equal
    for name in by_size[rank::ranks]:
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            return f"{folder / name} cannot be read: {error}"
        if files[name].sha256 not in (None, found):
            return f"{folder / name} has the SHA-256 {found}, {files[name].sha256} was written: its content has changed"
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    found = (p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=step_of)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, also a model folder, or a run folder's newest whole one.

    Raises:
        CheckpointError: there is none, or it may not be looked at, or the one named is damaged.
    """
    try:
        is_checkpoint = _NAME.fullmatch(path.name) or (path / MARKER).exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be looked at: {error.strerror}; name a folder that can be") from error
    if is_checkpoint:
        candidates = [path]
    else:
        candidates = checkpoints_of(path)[::-1]
        if not candidates:
            raise CheckpointError(f"{path} holds no checkpoint: name a run's folder or a step-XXXXXXXX folder in it")
    defects = []
    for candidate in candidates:
        problem = incomplete_reason(candidate)
        if problem is None:
            return candidate
        defects.append(problem)
    raise CheckpointError(f"no whole checkpoint in {path}: " + "; ".join(defects))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``."""
    path = checkpoint / STATE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must be a JSON object, but is a {type(content).__name__}")
    if content.get("format") != STATE_FORMAT:
        found = content.get("format")
        raise CheckpointError(f"{path} has format {found!r}, this version of dcscale reads {STATE_FORMAT}")
    return content


def read_config(checkpoint: Path) -> Config:
    """The resolved config a checkpoint was written with."""
    try:
        return load_config([str(checkpoint / CONFIG)], []).config
    except ConfigError as error:
        raise CheckpointError(f"the config of {checkpoint} cannot be read: {error}") from error
