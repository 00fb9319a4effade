"""What a folder is, found out from what is in it and not from its name; and what only the command line can tell."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dcscale.checkpoint import CheckpointError, checkpoints_of, find_checkpoint
from dcscale.checkpoint.layout import MARKER, OLD_OPTIMIZER, OPTIMIZER, corrupt_reason
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats.huggingface import MODEL_TYPE
from dcscale.convert.formats.maxtext import find_state
from dcscale.convert.formats.transformers import FAMILIES as TRANSFORMERS
from dcscale.convert.formats.upstream_config import FAMILIES as UPSTREAM

_FAMILIES = f"{MODEL_TYPE} (exported), {', '.join(UPSTREAM)} (upstream) and {', '.join(TRANSFORMERS)} (transformers)"


@dataclass(frozen=True)
class Source:
    """``kind``: ``dcscale``, ``huggingface`` (dcscale's model for transformers), ``upstream``, ``maxtext`` or
    ``transformers`` (a plain Transformer of that library); ``folder``: where its parts are; ``description``: what
    to tell a person."""

    kind: str
    folder: Path
    description: str
    settings: dict[str, Any] = field(default_factory=dict)
    """Content of config.json, where the source has one."""


def detect(path: Path) -> Source:
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
        if problem := corrupt_reason(folder, left_out=OPTIMIZER):
            raise ConversionError(f"the checkpoint is damaged: {problem}; name another one")
        trained = any((folder / name).is_dir() for name in (OPTIMIZER, OLD_OPTIMIZER))
        words = "dcscale training checkpoint" if trained else "dcscale model folder"
        return Source("dcscale", folder, f"{words} {folder}")
    if (state := find_state(path)) is not None:
        return Source("maxtext", state, f"MaxText checkpoint {state}")
    config = path / "config.json"
    if config.is_file():
        try:
            settings = json.loads(config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConversionError(f"{config} cannot be read: {error}") from error
        family = settings.get("model_type") if isinstance(settings, dict) else None
        if family == MODEL_TYPE:
            return Source("huggingface", path, f"Hugging Face folder of a dcscale model {path}", settings)
        if isinstance(family, str) and family in UPSTREAM:
            return Source("upstream", path, f"upstream {UPSTREAM[family]} folder {path}", settings)
        if isinstance(family, str) and family in TRANSFORMERS:
            return Source("transformers", path, f"{TRANSFORMERS[family]} folder {path}, of transformers", settings)
        raise ConversionError(f"{config} has model_type {family!r}: only {_FAMILIES} can be converted")
    raise ConversionError(
        f"{path} is nothing that can be converted: looked for {MARKER} (a dcscale checkpoint or model folder), "
        f"checkpoints/step-XXXXXXXX (a dcscale run), params.*/.zarray or manifest.ocdbt (MaxText), and "
        f"config.json with model_type {_FAMILIES}"
    )


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; :func:`source_options` reads them."""
    group = parser.add_argument_group("what the source's files do not tell")
    group.add_argument(
        "--from-copies",
        choices=("merged", "original"),
        help="upstream: take dw_m, qkw_m or dw1, dd, qkw (default: the trained ones, found by their values)",
    )
    group.add_argument(
        "--gelu",
        choices=("tanh", "erf"),
        help="upstream: of the compose projection (default: erf if trained by upstream's PyTorch code, else tanh)",
    )
    group.add_argument(
        "--local-keys",
        type=int,
        metavar="N",
        help="upstream: keys a query of a local layer sees, itself included (default: window_size, one more if trained "
        "by upstream's PyTorch code)",
    )
    group.add_argument(
        "--maxtext-config",
        type=Path,
        metavar="FILE.yml",
        help="MaxText: the config of its run (default: config.yml in its folders)",
    )


def source_options(options: argparse.Namespace) -> dict[str, Any]:
    """They, as :func:`dcscale.convert.prepare` takes them."""
    return {
        "truth": options.from_copies,
        "gelu": options.gelu,
        "local_keys": options.local_keys,
        "maxtext_config": options.maxtext_config,
    }
