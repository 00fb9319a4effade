"""What a checkpoint's config and state say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dcscale.checkpoint.layout import CONFIG, STATE, STATE_FORMAT, CheckpointError
from dcscale.config import Config, ConfigError, load_config


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
