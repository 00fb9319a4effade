"""What a folder is: found out from what lies in it, not from its name."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import MARKER, OLD_OPTIMIZER, OPTIMIZER
from dcscale.convert.errors import ConversionError
from dcscale.convert.huggingface import MODEL_TYPE
from dcscale.convert.upstream_config import FAMILIES


@dataclass(frozen=True)
class Found:
    """``kind``: ``dcscale``, ``upstream`` or ``huggingface``; ``folder``: where its parts lie; ``words``: to tell."""

    kind: str
    folder: Path
    words: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Content of config.json, where that is what the folder has."""


def detect(path: Path) -> Found:
    """What ``path`` holds.

    Raises:
        ConversionError: nothing that is known; the message says what was looked for.
    """
    if not path.is_dir():
        raise ConversionError(f"{path} is no folder: name the folder of a checkpoint, a run or a model")
    if (path / MARKER).exists() or checkpoints_of(path) or path.name.startswith("step-"):
        try:
            folder = find_checkpoint(path)
        except CheckpointError as error:
            raise ConversionError(str(error)) from error
        trained = any((folder / name).is_dir() for name in (OPTIMIZER, OLD_OPTIMIZER))
        words = "dcscale training checkpoint" if trained else "dcscale model folder"
        return Found("dcscale", folder, f"{words} {folder}")
    config = path / "config.json"
    if config.is_file():
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(f"{config} cannot be read: {error}") from error
        family = settings.get("model_type") if isinstance(settings, dict) else None
        if family == MODEL_TYPE:
            return Found("huggingface", path, f"Hugging Face folder of a dcscale model {path}", settings)
        if not isinstance(family, str) or family not in FAMILIES:
            raise ConversionError(
                f"{config} has model_type {family!r}: only {', '.join([*FAMILIES, MODEL_TYPE])} can be converted"
            )
        return Found("upstream", path, f"upstream {FAMILIES[family]} folder {path}", settings)
    raise ConversionError(
        f"{path} is nothing that can be converted: looked for {MARKER} (a dcscale checkpoint or model folder), "
        f"checkpoints/step-XXXXXXXX (a dcscale run), and config.json with model_type {' or '.join(FAMILIES)} "
        f"(upstream) or {MODEL_TYPE} (Hugging Face)"
    )
