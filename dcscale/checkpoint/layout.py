"""Where a checkpoint's parts lie, and which checkpoints of a run are whole.

RUN/checkpoints/
  latest                     name of the newest checkpoint
  step-00000100/
    COMPLETE                 written last: {"format", "files": {name: bytes}}
    state.json               step, tokens, data position, versions: see dcscale.train.state
    config.yaml              the resolved config
    tokenizer.json           the tokenizer, where it is not the bytes
    optimizer/               float32 weights and the optimizer's moments, each rank its part: see
                             dcscale.checkpoint.fragments
    weights/                 the model alone: safetensors shards and their index

A *model folder*, as tools/convert_checkpoint.py writes it, is the same without optimizer/, under any name.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from dcscale.files import write_json

FORMAT = 1
STATE_FORMAT = 1
MARKER = "COMPLETE"
STATE, CONFIG, OPTIMIZER, WEIGHTS, LATEST = "state.json", "config.yaml", "optimizer", "weights", "latest"
OLD_OPTIMIZER = "deepspeed"
"""Where checkpoints once had pickles of DeepSpeed in place of ``OPTIMIZER``: they are not loaded any more."""
TEMPORARY_PREFIX = ".unfinished-"
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, or used for this run."""


def step_name(step: int) -> str:
    return f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not named like a checkpoint: expected step-XXXXXXXX")
    return int(match[1])


def seal(folder: Path) -> None:
    """Writes the marker: with it, the folder is a whole checkpoint."""
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(folder.rglob("*")) if p.is_file()}
    write_json(folder / MARKER, {"format": FORMAT, "files": files})


def defect(folder: Path) -> str | None:
    """Why ``folder`` is not a whole checkpoint, or None if it is one. Compares sizes, not contents."""
    marker = folder / MARKER
    try:
        content = json.loads(marker.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return f"{marker} is missing: the checkpoint was not finished"
    except (OSError, ValueError) as error:
        return f"{marker} is not readable: {error}"
    if not isinstance(content, dict):
        return f"{marker} must be a JSON object, but is a {type(content).__name__}"
    if content.get("format") != FORMAT:
        return f"{marker} has format {content.get('format')!r}, this version of dcscale reads {FORMAT}"
    files = content.get("files")
    if not isinstance(files, dict):
        return f"{marker} has files {files!r}, but must map the files' names to their bytes"
    for name, size in files.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != size:
            return f"{path} has {path.stat().st_size} bytes, {size} were written"
    return None


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    found = (p for p in (run / "checkpoints").glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir())
    return sorted(found, key=step_of)


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, also a model folder, or a run folder's newest whole one.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if _NAME.fullmatch(path.name) or (path / MARKER).exists():
        candidates = [path]
    else:
        candidates = checkpoints_of(path)[::-1]
        if not candidates:
            raise CheckpointError(f"{path} holds no checkpoint: name a run's folder or a step-XXXXXXXX folder in it")
    defects = []
    for candidate in candidates:
        problem = defect(candidate)
        if problem is None:
            return candidate
        defects.append(problem)
    raise CheckpointError(f"no whole checkpoint in {path}: " + "; ".join(defects))
