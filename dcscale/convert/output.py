"""A result's folder: written under another name beside its place, moved there when it is whole."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcscale.checkpoint.layout import CONFIG, MARKER, STATE, TEMPORARY_PREFIX, WEIGHTS
from dcscale.convert.detect import detect
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import huggingface
from dcscale.files import sync_folder, sync_tree

_OWN = re.compile(
    "|".join(
        [
            *map(re.escape, (MARKER, STATE, CONFIG)),
            WEIGHTS,
            r"config\.json",
            *map(re.escape, huggingface.FILES),
            r"model(-\d+)?\.safetensors(\.index\.json)?",
        ]
    )
)
"""What may be in a folder that is replaced: nothing but what a conversion writes."""


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Raises ConversionError where ``target`` may not be written."""
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise ConversionError(f"{target} and the source {source} lie in each other: name another place")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ConversionError(f"{target} exists: name another place, or replace it with --overwrite")
    try:
        found = detect(target)
    except ConversionError as error:
        raise ConversionError(f"{target} is not replaced, as it holds no model: {error}") from error
    if found.folder != target or target.is_symlink():
        raise ConversionError(f"{target} is not replaced: it is a run or a link; remove it")
    strange = sorted(path.name for path in target.iterdir() if not _OWN.fullmatch(path.name))
    if strange:
        raise ConversionError(f"{target} is not replaced, as it holds more than a model: {', '.join(strange)}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target``, replacing what is there, if nothing is raised."""
    temporary = target.with_name(TEMPORARY_PREFIX + target.name)
    old = target.with_name(TEMPORARY_PREFIX + target.name + "-old")
    if old.exists() and not target.exists():  # killed between the two renames below
        old.rename(target)
    for leftover in (temporary, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
