"""A result's folder: written under another name beside its place, moved there when it is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dcscale.checkpoint.layout import ENGINE, TEMPORARY_PREFIX
from dcscale.convert.errors import ConversionError
from dcscale.convert.formats import detect
from dcscale.files import sync_folder, sync_tree


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
    if found.folder != target or (target / ENGINE).exists() or target.is_symlink():
        raise ConversionError(f"{target} is not replaced: it is a run, a training checkpoint or a link; remove it")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which becomes ``target``, replacing what is there, if nothing is raised."""
    temporary = target.with_name(TEMPORARY_PREFIX + target.name)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        sync_tree(temporary)
        old = target.with_name(TEMPORARY_PREFIX + target.name + "-old")
        if target.exists():
            target.rename(old)
        temporary.rename(target)
        sync_folder(target.parent)
        if old.exists():
            shutil.rmtree(old)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
