"""Shards on disk: WebDataset tars of token bundles. The only file that imports webdataset.

A sample is a bundle of complete documents in two members that any WebDataset reader can decode; the format is described
in :mod:`dcscale.data.shards.manifest`. Third-party tars of text are read by :mod:`dcscale.data.shards.text`.

The entire shard is read into memory and checked against the manifest before it is parsed, so that no part of a corrupt
shard is ever used; see :mod:`dcscale.data.shards.tar`. Parsing bundles of 64k tokens costs less than the checksum.
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
from dcscale.data.shards.tar import REBUILD_HINT, Member, member_bytes, raise_shard_error, read_samples
from dcscale.data.shards.text import TextReader
from dcscale.data.storage import ContentError, Storage, UnreadableError
from dcscale.files import write_atomically

TOKEN_EXTENSIONS = ("tokens.npy", "npy")
"""Extensions of the members that hold tokens; a sample has exactly one of them."""

# The header that NumPy writes for one-dimensional uint16 and uint32 arrays. NumPy's own header parser uses Python's
# literal parser, which in some versions (CPython issue 106905) occasionally fails when several threads parse; that
# would look like a corrupt shard.
_NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '(<u[24])', 'fortran_order': False, 'shape': \((\d+),\), \} *\n", re.DOTALL
)


def write_shard(
    folder: Path, name: str, bundles: Iterable[tuple[str, list[np.ndarray]]], *, dtype: str, text_bytes: int
) -> ShardInfo:
    """Write one shard atomically; the same bundles give the same bytes.

    Args:
        folder: folder of the manifest.
        name: path of the shard relative to ``folder``.
        bundles: (key without dots, documents) of each sample; a document is an integer array [tokens of the document].
        dtype: type of the tokens on disk, ``uint16`` or ``uint32``.
        text_bytes: UTF-8 bytes of the documents' text, for the manifest.

    Returns:
        The shard's entry in the manifest.
    """
    buffer = io.BytesIO()
    samples = documents = tokens = 0
    with webdataset.TarWriter(buffer, mtime=0) as writer:  # a fixed time, so that the bytes are reproducible
        for key, bundle in bundles:
            values = np.concatenate(bundle).astype(dtype, copy=False)
            lengths = np.array([len(document) for document in bundle], dtype="uint32")
            writer.write({"__key__": key, "tokens.npy": values, "lens.npy": lengths})
            samples, documents, tokens = samples + 1, documents + len(bundle), tokens + len(values)
    data = buffer.getbuffer()
    write_atomically(folder / name, data)
    return ShardInfo(name, len(data), hashlib.sha256(data).hexdigest(), samples, documents, tokens, text_bytes)


def check_shards(storage: Storage, shards: Iterable[ShardInfo]) -> None:
    """Check, without reading them, that shards exist and have the sizes in the manifest.

    Raises:
        DataError: a shard is missing or has another size.
    """
    try:
        storage.check({info.name: info.bytes for info in shards})
    except (UnreadableError, ContentError) as error:
        raise _unusable(error) from error


def read_shard(
    storage: Storage, info: ShardInfo, *, dtype: str, vocab_size: int, verify: bool, text: TextReader | None = None
) -> list[np.ndarray]:
    """Read the documents of a shard.

    Args:
        storage: root of the manifest.
        info: the shard's entry in the manifest.
        dtype: type of the tokens, from the manifest.
        vocab_size: every token id must be below it.
        verify: check the SHA-256 too; sizes and counts are always checked.
        text: the tokenizing reader, if the shards hold text.

    Returns:
        The documents in their order on disk: read-only views [tokens of the document] into the shard's bytes.

    Raises:
        DataError: the shard is missing, or does not match its entry, the format or the vocabulary.
    """
    try:
        data = storage.read(info.name, info.bytes, info.sha256 if verify else None)
    except (UnreadableError, ContentError) as error:
        raise _unusable(error) from error

    path = storage.location(info.name)
    documents: list[np.ndarray] = []
    samples = total = 0
    for key, tokens, lengths in text.samples(path, data) if text else token_samples(path, data, dtype):
        largest = int(tokens.max())
        if largest >= vocab_size:
            problem = f"sample {key}: token id {largest} is not below model.vocab_size, {vocab_size}"
            raise_shard_error(path, problem, "set model.vocab_size above it, if the shards are right")
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        documents += [tokens[start:end] for start, end in zip([0, *ends], ends)]
        samples, total = samples + 1, total + len(tokens)
    # The order of training is computed from the manifest's counts, so they must be exact.
    for name, found in (("samples", samples), ("documents", len(documents)), ("tokens", total)):
        if found != getattr(info, name):
            raise_shard_error(path, f"it holds {found} {name}, but the manifest says {getattr(info, name)}")
    return documents


def token_samples(path: str, data: bytes, dtype: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield (key, tokens [n], lengths [documents]) of each sample of a token shard.

    All lengths are positive and sum to n.

    Args:
        path: path or address of the shard, for error messages.
        data: content of the shard.
        dtype: type that the tokens must have.

    Raises:
        DataError: the tar is incomplete or malformed, or does not follow the format.
    """
    for key, members in read_samples(path, data):
        found = [extension for extension in TOKEN_EXTENSIONS if extension in members]
        if len(found) != 1:
            has = " and ".join(found) or "no tokens.npy"
            raise_shard_error(path, f"sample {key} has {has}, or its members are not adjacent")
        tokens = _array(path, data, members[found[0]], np.dtype(dtype))
        lengths = np.array([len(tokens)], dtype="uint32")  # without lens.npy, the sample is one document
        if "lens.npy" in members:
            lengths = _array(path, data, members["lens.npy"], lengths.dtype)
        if len(lengths) == 0 or int(lengths.min()) == 0 or int(lengths.sum(dtype=np.int64)) != len(tokens):
            raise_shard_error(path, f"sample {key}: lens.npy must be positive and sum to its {len(tokens)} tokens")
        yield key, tokens, lengths


def detect_token_dtype(path: str, data: bytes) -> str:
    """Type of the tokens in the first sample that has any.

    Raises:
        DataError: no sample has tokens, or the tar is malformed.
    """
    for _, members in read_samples(path, data):
        for extension in TOKEN_EXTENSIONS:
            if member := members.get(extension):
                return str(_npy_header(path, member.name, member_bytes(path, data, member))[1])
    return raise_shard_error(path, f"none of its samples has a member {' or '.join(TOKEN_EXTENSIONS)}")


def _array(path: str, data: bytes, member: Member, dtype: np.dtype) -> np.ndarray:
    """The one-dimensional array of a ``.npy`` member, as a view into ``data``; never unpickles anything."""
    npy, dtype = member_bytes(path, data, member), dtype.newbyteorder("<")
    shape, found, offset = _npy_header(path, member.name, npy)
    if found.hasobject:
        raise_shard_error(path, f"member {member.name} holds pickled objects, which are never loaded")
    if found != dtype or len(shape) != 1:
        problem = f"member {member.name} is {found} with shape {shape}, but must be {dtype} with one axis"
        raise_shard_error(path, problem)
    if offset + shape[0] * dtype.itemsize != len(npy):
        problem = f"member {member.name} has {len(npy) - offset} bytes of data, but shape {shape} of {dtype}"
        raise_shard_error(path, problem)
    return np.frombuffer(npy, dtype, count=shape[0], offset=offset)


def _npy_header(path: str, name: str, npy: memoryview) -> tuple[tuple[int, ...], np.dtype, int]:
    """(shape, dtype, byte offset of the data) of a ``.npy`` member."""
    usual = _NPY_HEADER.match(npy)
    # Bytes 8 and 9 hold the length of the header after the first 10 bytes.
    if usual and usual.end() == 10 + int.from_bytes(npy[8:10], "little"):
        return (int(usual[2]),), np.dtype(usual[1].decode()), usual.end()
    header = io.BytesIO(npy[:4096])
    try:
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise ValueError(f"its version is {version}")
        shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    except Exception as error:  # ValueError, or anything that a corrupt header makes NumPy's literal parser raise
        raise_shard_error(path, f"member {name} is not an npy array of version 1.0: {error}")
    return shape, dtype, header.tell()


def _unusable(error: UnreadableError | ContentError) -> DataError:
    if isinstance(error, ContentError):
        return DataError(f"{error}; {REBUILD_HINT}")
    return DataError(
        f"{error.location}: the manifest names this shard, but it cannot be read: {error.reason}; copy it again"
    )
