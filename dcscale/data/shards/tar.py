"""Samples of WebDataset tars held in memory: which members belong together, and where their bytes are.

The rules are WebDataset's. A member is named ``KEY.EXT``: KEY may contain folders and ends at the first dot after the
last slash; EXT is the rest, in lower case. Consecutive members with the same key form a sample. Folders, and members
whose names do not have this form, belong to no sample.

Only headers are parsed. A tar of plain files, as WebDataset writes it, is parsed here, ten times as fast as by the
standard library's tarfile. If any header is of another kind, such as the long names (PAX, GNU) of third-party tars,
tarfile parses the entire tar.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple, NoReturn

from dcscale.data.errors import DataError

REBUILD_HINT = "copy the shard again or rebuild it with tools/make_shards.py"
"""How to fix a corrupt shard, for error messages."""

_ZEROS = bytes(tarfile.BLOCKSIZE)
# POSIX header of a plain file: name, mode, owner, group, size, time, checksum, type "0", empty link name, no prefix.
_PLAIN_HEADER = re.compile(
    rb"(?P<name>[!-~]+)\0+(?<=^.{100})[0-7]{7}\0[0-7]{7}\0[0-7]{7}\0(?P<size>[0-7]{11})\0[0-7]{11}\0"
    rb"(?P<sum>[0-7]{6})\0 0\0{100}ustar\x0000.{80}\0{167}",
    re.DOTALL,
)
_MEMBER_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")


class Member(NamedTuple):
    """A member of a tar, other than a folder."""

    name: str
    begin: int
    """Byte offset of its content in the tar."""
    size: int
    """Bytes of its content."""
    regular: bool = True
    """False for links, devices and sparse files."""


class Sample(NamedTuple):
    """Members with the same key."""

    key: str
    members: dict[str, Member]
    """Extension -> member."""


def read_samples(path: str, data: bytes) -> Iterator[Sample]:
    """Yield the samples of a tar, in order.

    Args:
        path: path or address of the tar, for error messages.
        data: content of the tar.

    Raises:
        DataError: the tar is incomplete or malformed, or the members of a sample are not adjacent.
    """
    keys: set[str] = set()
    current = Sample("", {})
    for member in _members(path, data):
        if not (name := _MEMBER_NAME.fullmatch(member.name)):
            continue
        key, extension = name[1], name[2].lower()
        if key != current.key:
            if current.key:
                yield current
            if key in keys:
                raise_shard_error(path, f"sample {key} appears twice, or its members are not adjacent")
            keys.add(key)
            current = Sample(key, {})
        if extension in current.members:
            raise_shard_error(path, f"member {member.name} appears twice")
        current.members[extension] = member
    if current.key:
        yield current


def member_bytes(path: str, data: bytes, member: Member) -> memoryview:
    """The content of a member, as a view into ``data``.

    Raises:
        DataError: the member is not a regular file.
    """
    if not member.regular:
        raise_shard_error(path, f"member {member.name} is not a regular file")
    return memoryview(data)[member.begin : member.begin + member.size]


def raise_shard_error(path: str, problem: str, fix: str = REBUILD_HINT) -> NoReturn:
    """Raise the DataError of a shard.

    Args:
        path: path or address of the shard.
        problem: what is wrong with it.
        fix: what the user can do.
    """
    raise DataError(f"{path}: {problem}; {fix}")


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
            raise_shard_error(path, f"it is not a readable tar: {error}")
    members, end = found
    # Both parsers stop at a corrupt header as if it were the end, so only zeros may follow, and at least one block.
    rest = data[end:]
    if len(rest) < tarfile.BLOCKSIZE or rest.count(0) != len(rest):
        raise_shard_error(path, f"it is not a complete tar: at byte {end} there is neither a member nor the end marker")
    return members


def _plain_members(data: bytes) -> tuple[list[Member], int] | None:
    """(members, offset of their end); None if a header is not that of a plain file with a short ASCII name."""
    members, at = [], 0
    while (header := data[at : at + tarfile.BLOCKSIZE]) and header != _ZEROS:
        fields = _PLAIN_HEADER.fullmatch(header)
        # POSIX: the checksum is the sum of the header's bytes, with the checksum field (148:156) counted as spaces.
        if fields is None or int(fields["sum"], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return None
        begin, size = at + tarfile.BLOCKSIZE, int(fields["size"], 8)
        members.append(Member(fields["name"].decode(), begin, size))
        at = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE  # content is padded to full blocks
    return (members, at) if at < len(data) else None
