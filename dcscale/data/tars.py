"""Samples of WebDataset tars held in memory: which members belong together, and where their bytes lie.

The rules are those of WebDataset: a member is called ``KEY.KIND``, where KEY may have folders before it and ends at the
first dot after them, and KIND is what follows, in lower case; members that follow each other with the same key are a
sample. Members whose names are not of this form, and folders, belong to none.

Parsing is by the standard library's tarfile, on headers only, so it also reads the long names (PAX, GNU) of other
people's tars. Where it stops, nothing but zeros may follow: a damaged header or a missing end would else be taken for
the end.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from dcscale.data.errors import DataError

ANEW = "copy the shard again or make it anew with tools/make_shards.py"
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class Sample(NamedTuple):
    """Members with the same key."""

    key: str
    members: dict[str, tarfile.TarInfo]
    """Kind -> member."""


def read_samples(path: str, data: bytes) -> Iterator[Sample]:
    """The samples of a tar, in order.

    Raises:
        DataError: it is no whole tar, or members of a sample do not lie side by side.
    """
    keys: set[str] = set()
    current = Sample("", {})
    for member in _members(path, data):
        if not (name := _NAME.fullmatch(member.name)):
            continue
        key, kind = name[1], name[2].lower()
        if key != current.key:
            if current.key:
                yield current
            if key in keys:
                fail(path, f"sample {key} appears twice, or its members do not lie side by side")
            keys.add(key)
            current = Sample(key, {})
        if kind in current.members:
            fail(path, f"member {member.name} appears twice")
        current.members[kind] = member
    if current.key:
        yield current


def content(path: str, data: bytes, member: tarfile.TarInfo) -> memoryview:
    """What a member holds.

    Raises:
        DataError: it is a link or the like.
    """
    if not member.isreg() or member.issparse():
        fail(path, f"member {member.name} is not a regular file")
    return memoryview(data)[member.offset_data : member.offset_data + member.size]


def _members(path: str, data: bytes) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [member for member in tar if not member.isdir()]
            end = tar.offset
    except tarfile.TarError as error:
        fail(path, f"it is not a readable tar: {error}")
    rest = data[end:]
    if len(rest) < tarfile.BLOCKSIZE or rest.count(0) != len(rest):
        fail(path, f"it is not a whole tar: at byte {end} there is neither a member nor the end")
    return members


def fail(path: str, what: str, fix: str = ANEW) -> NoReturn:
    """Raise the error of a shard."""
    raise DataError(f"{path}: {what}; {fix}")
