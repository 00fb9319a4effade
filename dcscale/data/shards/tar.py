"""Samples of WebDataset tars held in memory: which members belong together, and where their bytes lie.

The rules are those of WebDataset: a member is called ``KEY.KIND``, where KEY may have folders before it and ends at the
first dot after them, and KIND is what follows, in lower case; members that follow each other with the same key are a
sample. Members whose names are not of this form, and folders, belong to none.

Parsing is on headers only. Tars of nothing but plain files, as WebDataset writes them, are walked here, ten times as
fast as the standard library's tarfile; the first header that is anything else leaves the whole tar to tarfile, so that
the long names (PAX, GNU) of other people's tars are read too. Where it stops, nothing but zeros may follow: a damaged
header or a missing end would else be taken for the end.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from dcscale.data.errors import DataError

ANEW = "copy the shard again or make it anew with tools/make_shards.py"
_ZEROS = bytes(tarfile.BLOCKSIZE)
# Name, mode, owner, group, size, time, checksum, type and link's name, as POSIX has them; no prefix of the name.
_PLAIN = re.compile(
    rb"(?P<name>[!-~]+)\0+(?<=^.{100})[0-7]{7}\0[0-7]{7}\0[0-7]{7}\0(?P<size>[0-7]{11})\0[0-7]{11}\0"
    rb"(?P<sum>[0-7]{6})\0 0\0{100}ustar\x0000.{80}\0{167}",
    re.DOTALL,
)
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class Member(NamedTuple):
    """A file, or the like, in a tar."""

    name: str
    begin: int
    size: int
    """Where its bytes lie."""
    regular: bool = True
    """No link or the like."""


class Sample(NamedTuple):
    """Members with the same key."""

    key: str
    members: dict[str, Member]
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


def content(path: str, data: bytes, member: Member) -> memoryview:
    """What a member holds.

    Raises:
        DataError: it is a link or the like.
    """
    if not member.regular:
        fail(path, f"member {member.name} is not a regular file")
    return memoryview(data)[member.begin : member.begin + member.size]


def _members(path: str, data: bytes) -> list[Member]:
    found = _plain_members(data)
    if found is None:
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                members = [
                    Member(member.name, member.offset_data, member.size, member.isreg() and not member.issparse())
                    for member in tar
                    if not member.isdir()
                ]
                found = members, tar.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:  # the last two from PAX and sparse headers
            fail(path, f"it is not a readable tar: {error}")
    members, end = found
    rest = data[end:]
    if len(rest) < tarfile.BLOCKSIZE or rest.count(0) != len(rest):
        fail(path, f"it is not a whole tar: at byte {end} there is neither a member nor the end")
    return members


def _plain_members(data: bytes) -> tuple[list[Member], int] | None:
    """(members, where they end); None where some header is not that of a plain file with a short name in ASCII."""
    members, at = [], 0
    while (header := data[at : at + tarfile.BLOCKSIZE]) and header != _ZEROS:
        fields = _PLAIN.fullmatch(header)
        if fields is None or int(fields["sum"], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return None
        begin, size = at + tarfile.BLOCKSIZE, int(fields["size"], 8)
        members.append(Member(fields["name"].decode(), begin, size))
        at = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    return (members, at) if at < len(data) else None


def fail(path: str, what: str, fix: str = ANEW) -> NoReturn:
    """Raise the error of a shard."""
    raise DataError(f"{path}: {what}; {fix}")
