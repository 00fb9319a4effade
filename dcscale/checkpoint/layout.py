"""Files of a checkpoint, and which checkpoints of a run are complete.

RUN/checkpoints/
  latest                     name of the newest checkpoint
  step-00000100/
    COMPLETE                 the marker, written last: {"format", "files": {name: {"bytes", "sha256"}}}
    state.json               step, tokens, data position, validation loss, state of the hooks, versions, git revision:
                             see dcscale.train.state
    config.yaml              the resolved config
    tokenizer.json           the tokenizer, unless the run uses the byte tokenizer
    optimizer/               float32 weights and Adam moments, one file per rank: see dcscale.checkpoint.training_state
    weights/                 the model only: safetensors shards and their index
    probe.safetensors        a few tokens and the model's logits for them: see dcscale.checkpoint.probe

There are no random number generator states, because training draws from no generator that has a state: initial weights,
data order and samples are functions of the seed, a name and a number, and the model has no dropout.

A *model folder*, as written by tools/convert_checkpoint.py, has the same files except optimizer/ and probe.safetensors,
and may have any name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from dcscale.config import Config, ConfigError, load_config
from dcscale.files import may_succeed_later, read_json, sha256_of, write_json

FORMAT = 2
"""Format of the marker."""
STATE_FORMAT = 1
"""Format of ``state.json``."""
MARKER = "COMPLETE"
STATE, CONFIG, OPTIMIZER, WEIGHTS, LATEST = "state.json", "config.yaml", "optimizer", "weights", "latest"
PROBE = "probe.safetensors"
MAX_LISTED = 8
"""Number of problems that an error message lists; the rest is only counted."""
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written or found, or cannot be used for this run.

    Args:
        message: the message.
        retry: whether the same may succeed later: the disk is full, failing or unreachable.
        rank: the rank that it happened on, if all ranks raise it together; None: the one that raises it.
    """

    def __init__(self, message: str, *, retry: bool = False, rank: int | None = None) -> None:
        super().__init__(message)
        self.retry, self.rank = retry, rank


def join_problems(problems: list[str]) -> str:
    """The first ``MAX_LISTED`` problems as one text, and how many more there are."""
    more = len(problems) - MAX_LISTED
    return "; ".join(problems[:MAX_LISTED]) + (f"; and {more} more" if more > 0 else "")


def step_name(step: int) -> str:
    """Name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint folder.

    Raises:
        CheckpointError: the folder is not named ``step-XXXXXXXX``.
    """
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint: expected step-XXXXXXXX")
    return int(match[1])


class FileRecord(NamedTuple):
    """What the marker records of a file."""

    bytes: int
    sha256: str


def record_files(folder: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Reads files in ``folder`` and returns their sizes and checksums by name, for :func:`seal`."""
    return {name: FileRecord((folder / name).stat().st_size, sha256_of(folder / name)) for name in names}


def files_in(folder: Path) -> list[str]:
    """The names of all files below ``folder``, relative to it, sorted."""
    return [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]


def seal(folder: Path, files: Mapping[str, FileRecord] | None = None) -> None:
    """Writes the marker, which makes the folder a complete checkpoint. Without ``files``, reads all files in it."""
    if files is None:
        files = record_files(folder, (name for name in files_in(folder) if name != MARKER))
    write_json(folder / MARKER, {"format": FORMAT, "files": {name: file._asdict() for name, file in files.items()}})


def read_marker(folder: Path) -> dict[str, FileRecord]:
    """The recorded files of a checkpoint, by name.

    Raises:
        CheckpointError: there is no marker, or :func:`seal` did not write it.
    """
    marker = folder / MARKER
    try:
        content = read_json(marker, CheckpointError)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"{marker} is missing: the checkpoint was not finished") from None
        raise
    _check_format(marker, content, FORMAT)
    files = content.get("files")
    if not isinstance(files, dict):
        raise CheckpointError(f"{marker} has files {files!r}, but must map file names to their bytes and sha256")
    return {name: _parse_record(marker, name, entry) for name, entry in files.items()}


def _parse_record(marker: Path, name: str, entry: Any) -> FileRecord:
    # A name is joined to the folder and read: it must not lead out of it.
    if PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        raise CheckpointError(f"{marker} lists the file {name!r} outside its folder")
    try:
        return FileRecord(int(entry["bytes"]), str(entry["sha256"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        raise CheckpointError(f"{marker} must hold bytes and sha256 of {name}, but holds {entry!r}") from None


def incomplete_reason(folder: Path) -> str | None:
    """Why ``folder`` is not a complete checkpoint, or None if it is one. Compares sizes, not contents.

    Raises:
        CheckpointError: the disk fails, which does not tell.
    """
    try:
        files = read_marker(folder)
    except CheckpointError as error:
        return _unless_the_disk_fails(str(error), error)
    for name, file in files.items():
        path = folder / name
        try:
            size = path.stat().st_size if path.is_file() else None
        except OSError as error:
            return _unless_the_disk_fails(f"{path} cannot be read: {error.strerror}", error)
        if size is None:
            return f"{path} is missing"
        if size != file.bytes:
            return f"{path} has {size} bytes, {file.bytes} were written"
    return None


def _unless_the_disk_fails(problem: str, error: Exception) -> str:
    """The problem of a checkpoint, which is not corrupt because its disk is unreachable for a moment."""
    if may_succeed_later(error):
        message = f"{problem}. The checkpoint may be intact: start again, or, if this stays so, move it elsewhere"
        raise CheckpointError(message, retry=True) from error
    return problem


def corrupt_reason(folder: Path, skip: str = "", rank: int = 0, ranks: int = 1) -> str | None:
    """Why ``folder`` is incomplete or corrupt, or None if it is fine. Compares sizes and SHA-256 checksums.

    Args:
        folder: the checkpoint.
        skip: subfolder whose files are not read, such as ``WEIGHTS``: only their sizes are compared.
        rank: with ``ranks``, selects the share of the files that this rank reads; sizes are compared for all.
        ranks: number of shares. The folder is fine if no rank returns a reason.

    Raises:
        CheckpointError: the disk fails, which does not tell.
    """
    problem = incomplete_reason(folder)
    if problem is not None:
        return problem
    files = {name: file for name, file in read_marker(folder).items() if PurePath(name).parts[0] != skip}
    # Dealing the files out in the order of their size makes the shares about equal.
    by_size = sorted(files, key=lambda name: (-files[name].bytes, name))
    for name in by_size[rank::ranks]:
        try:
            found = sha256_of(folder / name)
        except OSError as error:
            return _unless_the_disk_fails(f"{folder / name} cannot be read: {error.strerror}", error)
        if files[name].sha256 != found:
            return f"{folder / name} has the SHA-256 {found}, {files[name].sha256} was written: its content has changed"
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, including incomplete ones."""
    found = (p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=step_of)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``: the checkpoint or model folder itself, or the newest complete one of a run folder.

    Raises:
        CheckpointError: there is none, ``path`` cannot be accessed, or the given checkpoint is incomplete.
    """
    try:
        is_checkpoint = _NAME.fullmatch(path.name) or (path / MARKER).exists()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be accessed: {error.strerror}; give a folder that can be read") from error
    if is_checkpoint:
        candidates = [path]
    else:
        candidates = checkpoints_of(path)[::-1]
        if not candidates:
            raise CheckpointError(f"{path} holds no checkpoint: give a run folder or a step-XXXXXXXX folder in it")
    problems = []
    for candidate in candidates:
        problem = incomplete_reason(candidate)
        if problem is None:
            return candidate
        problems.append(problem)
    raise CheckpointError(f"no complete checkpoint in {path}: " + "; ".join(problems))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The content of a checkpoint's ``state.json``.

    Raises:
        CheckpointError: it cannot be read, is not a JSON object, or has another format.
    """
    path = checkpoint / STATE
    content = read_json(path, CheckpointError)
    _check_format(path, content, STATE_FORMAT)
    return content


def _check_format(path: Path, content: Mapping[str, Any], expected: int) -> None:
    """Raises CheckpointError unless ``content``, the JSON object of ``path``, is of format ``expected``."""
    if content.get("format") != expected:
        found = content.get("format")
        raise CheckpointError(f"{path} has format {found!r}, this version of dcscale reads {expected}")


def read_config(checkpoint: Path) -> Config:
    """The resolved config that a checkpoint was written with.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return load_config([str(checkpoint / CONFIG)], expand=False).config
    except ConfigError as error:
        raise CheckpointError(f"the config of {checkpoint} cannot be read: {error}") from error
