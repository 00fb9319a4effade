"""Shards on disk: plain WebDataset tars of token bundles. The only file that knows webdataset.

A sample is a bundle of whole documents, two members that any WebDataset reader decodes;
:mod:`dcscale.data.shards.manifest` describes them. The text tars of others are read through
:mod:`dcscale.data.shards.text`.

A shard is read as a whole, checked against the manifest, and only then parsed, so that no part of a damaged shard is
ever used; see :mod:`dcscale.data.shards.tar`. With bundles of 64k tokens parsing costs less than the checksum.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import webdataset

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import ShardInfo
from dcscale.data.shards.tar import ANEW, Member, content, fail, read_samples
from dcscale.data.shards.text import TextReader
from dcscale.data.storage import ContentError, Storage, UnreadableError
from dcscale.files import write_atomically

TOKEN_KINDS = ("tokens.npy", "npy")
"""Members that hold tokens; a sample has one of them."""

# What NumPy writes for the arrays in question. Its own parser of headers calls Python's, which in some versions
# (CPython issue 106905) now and then fails where several threads parse: that would look like a damaged shard.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<u[24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.DOTALL
)


def write_shard(
    folder: Path, name: str, bundles: Iterable[tuple[str, list[np.ndarray]]], *, dtype: str, text_bytes: int
) -> ShardInfo:
    """Write one shard atomically; the same bundles give the same bytes.

    Args:
        folder: folder of the manifest.
        name: path of the shard inside it.
        bundles: (key without dots, documents: integer arrays [tokens of the document]) each.
        dtype: type of the tokens on disk, ``uint16`` or ``uint32``.
        text_bytes: UTF-8 bytes of the documents' text, for the manifest.
    """
    buffer = io.BytesIO()
    samples = documents = tokens = 0
    with webdataset.TarWriter(buffer, mtime=0) as writer:
        for key, bundle in bundles:
            values = np.concatenate(bundle).astype(dtype, copy=False)
            lengths = np.array([len(document) for document in bundle], dtype="uint32")
            writer.write({"__key__": key, "tokens.npy": values, "lens.npy": lengths})
            samples, documents, tokens = samples + 1, documents + len(bundle), tokens + len(values)
    data = buffer.getbuffer()
    write_atomically(folder / name, data)
    return ShardInfo(name, len(data), hashlib.sha256(data).hexdigest(), samples, documents, tokens, text_bytes)


def check_shards(source: Storage, shards: Iterable[ShardInfo]) -> None:
    """Check, without reading them, that shards are there and have the manifest's sizes.

    Raises:
        DataError: one is missing or has another size.
    """
    try:
        source.check({info.name: info.bytes for info in shards})
    except (UnreadableError, ContentError) as error:
        raise _unusable(error) from error


def read_shard(
    source: Storage, info: ShardInfo, *, dtype: str, vocab_size: int, verify: bool, text: TextReader | None = None
) -> list[np.ndarray]:
    """Read a shard's documents.

    Args:
        source: root of the manifest.
        info: the shard's entry in the manifest.
        dtype: type of the tokens, from the manifest.
        vocab_size: every token must be below it.
        verify: check the SHA-256 too; sizes and counts are always checked.
        text: makes the documents, where the manifest says that the shards hold text.

    Returns:
        The documents in their order on disk: read-only views [tokens of the document] into the shard's bytes.

    Raises:
        DataError: the shard is missing, or differs in any way from its entry, the format or the vocabulary.
    """
    try:
        data = source.read(info.name, info.bytes, info.sha256 if verify else None)
    except (UnreadableError, ContentError) as error:
        raise _unusable(error) from error

    path = source.where(info.name)
    documents: list[np.ndarray] = []
    samples = total = 0
    for key, tokens, lengths in text.samples(path, data) if text else samples_of(path, data, dtype):
        largest = int(tokens.max())
        if largest >= vocab_size:
            fix = "set model.vocab_size above it, if the shards are right"
            fail(path, f"sample {key}: token id {largest} is not below model.vocab_size, {vocab_size}", fix)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        documents += [tokens[start:end] for start, end in zip([0, *ends], ends)]
        samples, total = samples + 1, total + len(tokens)
    for name, found in (("samples", samples), ("documents", len(documents)), ("tokens", total)):
        if found != getattr(info, name):
            fail(path, f"it holds {found} {name}, but the manifest says {getattr(info, name)}")
    return documents


def samples_of(path: str, data: bytes, dtype: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(key, tokens [n], lengths [documents]) of each sample of a token shard; all lengths are positive, their sum is n.

    Raises:
        DataError: it is no whole tar, or does not follow the format.
    """
    for key, members in read_samples(path, data):
        kinds = [kind for kind in TOKEN_KINDS if kind in members]
        if len(kinds) != 1:
            fail(
                path,
                f"sample {key} has {' and '.join(kinds) or 'no tokens.npy'}, or its members do not lie side by side",
            )
        tokens = _array(path, data, members[kinds[0]], np.dtype(dtype))
        lengths = np.array([len(tokens)], dtype="uint32")
        if "lens.npy" in members:
            lengths = _array(path, data, members["lens.npy"], lengths.dtype)
        if len(lengths) == 0 or int(lengths.min()) == 0 or int(lengths.sum(dtype=np.int64)) != len(tokens):
            fail(path, f"sample {key}: lens.npy must be positive and sum to its {len(tokens)} tokens")
        yield key, tokens, lengths


def type_of_tokens(path: str, data: bytes) -> str:
    """Type of the tokens in the first sample that has any.

    Raises:
        DataError: it is no token shard.
    """
    for _, members in read_samples(path, data):
        for kind in TOKEN_KINDS:
            if kind in members:
                return str(_header(path, members[kind].name, content(path, data, members[kind]))[1])
    return fail(path, f"none of its samples has a member {' or '.join(TOKEN_KINDS)}")


def _array(path: str, data: bytes, member: Member, dtype: np.dtype) -> np.ndarray:
    """The one-dimensional array of a ``.npy`` member, as a view into ``data``; nothing is ever unpickled."""
    held, dtype = content(path, data, member), dtype.newbyteorder("<")
    shape, found, offset = _header(path, member.name, held)
    if found.hasobject:
        fail(path, f"member {member.name} holds pickled objects, which are never loaded")
    if found != dtype or len(shape) != 1:
        fail(path, f"member {member.name} is {found} with shape {shape}, but must be {dtype} with one axis")
    if offset + shape[0] * dtype.itemsize != len(held):
        fail(path, f"member {member.name} has {len(held) - offset} bytes of data, but shape {shape} of {dtype}")
    return np.frombuffer(held, dtype, count=shape[0], offset=offset)


def _header(path: str, name: str, held: memoryview) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, type, where the data begin) of a ``.npy`` member."""
    usual = _NPY_HEADER.match(held)
    if usual and usual.end() == 10 + int.from_bytes(held[8:10], "little"):
        return (int(usual[2]),), np.dtype(usual[1].decode()), usual.end()
    header = io.BytesIO(held[:4096])
    try:
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise ValueError(f"its version is {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    except Exception as error:  # ValueError, or whatever a damaged header makes NumPy's parser of literals raise
        fail(path, f"member {name} is not an npy array of version 1.0: {error}")
    return shape, dtype, header.tell()


def _unusable(error: UnreadableError | ContentError) -> DataError:
    if isinstance(error, ContentError):
        return DataError(f"{error}; {ANEW}")
    return DataError(
        f"{error.where}: the manifest names this shard, but it cannot be read: {error.reason}; copy it again"
    )
