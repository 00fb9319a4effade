"""Checks whether a conversion may write its target folder."""

from __future__ import annotations

import re
from pathlib import Path

from dcscale.checkpoint.layout import CONFIG, MARKER, STATE, WEIGHTS
from dcscale.convert.detect import detect
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import FORMATS
from dcscale.convert.tensor_map import TOKENIZER

_WRITTEN = re.compile(
    "|".join(
        [
            *map(re.escape, (MARKER, STATE, CONFIG, WEIGHTS, TOKENIZER, "config.json")),
            *(re.escape(name) for format in FORMATS for name in format.files),
            r"model(-\d+)?\.safetensors(\.index\.json)?",
        ]
    )
)
"""Names of the files that a conversion writes. A folder that holds any other file is not replaced."""


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Checks that ``target`` is a new folder or, if ``overwrite`` is set, the result of an earlier conversion.

    Raises:
        ConversionError: ``target`` must not be written.
    """
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConversionError(f"{target} and the source {source} contain one another: choose another target")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ConversionError(f"{target} exists: choose another target, or replace it with --overwrite")
    try:
        found = detect(target)
    except ConversionError as error:
        raise ConversionError(f"{target} is not replaced, because it is not a model: {error}") from error
    if found.folder != target or target.is_symlink():
        raise ConversionError(f"{target} is not replaced: it is a run or a link; remove it")
    others = sorted(path.name for path in target.iterdir() if not _WRITTEN.fullmatch(path.name))
    if others:
        raise ConversionError(f"{target} is not replaced, because it has files of others: {', '.join(others)}")
