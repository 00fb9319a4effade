"""Shards on disk: plain WebDataset tars of token bundles. The only file that knows webdataset.

A sample is a bundle of whole documents, two members that any WebDataset reader decodes:
``KEY.tokens.npy`` (uint16 or uint32, the documents one after another) and ``KEY.lens.npy`` (uint32, tokens of each).
A ``KEY.json`` beside them is allowed and not read.

A shard is read as a whole, checked against the manifest, and only then parsed, so that no part of a damaged shard is
ever used. Parsing is by the standard library's tarfile, on headers only: with bundles of 64k tokens it costs less than
the checksum, and it reads the long names (PAX, GNU) of other people's tars.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import webdataset

from dcscale.data.errors import DataError
from dcscale.data.manifest import ShardInfo
from dcscale.data.sources import ContentError, Source, UnreadableError
from dcscale.files import write_atomically

_MEMBERS = ("tokens.npy", "lens.npy")
_ANEW = "copy the shard again or make it anew with tools/make_shards.py"


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


def check_shards(source: Source, shards: Iterable[ShardInfo]) -> None:
    """Check, without reading them, that shards are there and have the manifest's sizes.

    Raises:
        DataError: one is missing or has another size.
    """
    try:
        source.check({info.name: info.bytes for info in shards})
    except (UnreadableError, ContentError) as error:
        raise _unusable(error) from error


def read_shard(source: Source, info: ShardInfo, *, dtype: str, vocab_size: int, verify: bool) -> list[np.ndarray]:
    """Read a shard's documents.

    Args:
        source: root of the manifest.
        info: the shard's entry in the manifest.
        dtype: type of the tokens, from the manifest.
        vocab_size: every token must be below it.
        verify: check the SHA-256 too; sizes and counts are always checked.

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
    for key, tokens, lengths in _samples(path, data, dtype):
        if len(lengths) == 0 or int(lengths.min()) == 0 or int(lengths.sum(dtype=np.int64)) != len(tokens):
            _fail(path, f"sample {key}: lens.npy must be positive and sum to its {len(tokens)} tokens")
        largest = int(tokens.max())
        if largest >= vocab_size:
            fix = "set model.vocab_size above it, if the shards are right"
            _fail(path, f"sample {key}: token id {largest} is not below model.vocab_size, {vocab_size}", fix)
        ends = np.cumsum(lengths, dtype=np.int64).tolist()
        documents += [tokens[start:end] for start, end in zip([0, *ends], ends)]
        samples, total = samples + 1, total + len(tokens)
    for name, found in (("samples", samples), ("documents", len(documents)), ("tokens", total)):
        if found != getattr(info, name):
            _fail(path, f"it holds {found} {name}, but the manifest says {getattr(info, name)}")
    return documents


def _samples(path: str, data: bytes, dtype: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(key, tokens [n], lengths [documents]) of each sample; a sample's members must lie side by side."""
    keys: set[str] = set()
    current, parts = "", dict.fromkeys(_MEMBERS)

    def complete() -> tuple[str, np.ndarray, np.ndarray]:
        missing = [name for name, value in parts.items() if value is None]
        if missing:
            _fail(path, f"sample {current} has no {missing[0]}, or its members do not lie side by side")
        return current, parts["tokens.npy"], parts["lens.npy"]

    for member in _members(path, data):
        key, _, kind = member.name.partition(".")
        if key != current:
            if current:
                yield complete()
            if key in keys:
                _fail(path, f"sample {key} appears twice, or its members do not lie side by side")
            keys.add(key)
            current, parts = key, dict.fromkeys(_MEMBERS)
        if kind in _MEMBERS:
            if parts[kind] is not None:
                _fail(path, f"member {member.name} appears twice")
            expected = np.dtype(dtype if kind == "tokens.npy" else "uint32").newbyteorder("<")
            parts[kind] = _array(path, data, member, expected)
        elif kind != "json":
            _fail(path, f"member {member.name} is none of KEY.tokens.npy, KEY.lens.npy, KEY.json")
    if current:
        yield complete()


def _members(path: str, data: bytes) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = [member for member in tar if not member.isdir()]
    except tarfile.TarError as error:
        _fail(path, f"it is not a readable tar: {error}")
    for member in members:
        if not member.isreg():
            _fail(path, f"member {member.name} is not a regular file")
    return members


def _array(path: str, data: bytes, member: tarfile.TarInfo, dtype: np.dtype) -> np.ndarray:
    """The one-dimensional array of a ``.npy`` member, as a view into ``data``; nothing is ever unpickled."""
    start, end = member.offset_data, member.offset_data + member.size
    header = io.BytesIO(data[start : min(end, start + 4096)])
    try:
        version = np.lib.format.read_magic(header)
        if version != (1, 0):
            raise ValueError(f"its version is {version}")
        shape, _, found = np.lib.format.read_array_header_1_0(header)
    except Exception as error:  # ValueError, or whatever a damaged header makes NumPy's parser of literals raise
        _fail(path, f"member {member.name} is not an npy array of version 1.0: {error}")
    if found.hasobject:
        _fail(path, f"member {member.name} holds pickled objects, which are never loaded")
    if found != dtype or len(shape) != 1:
        _fail(path, f"member {member.name} is {found} with shape {shape}, but must be {dtype} with one axis")
    offset = start + header.tell()
    if offset + shape[0] * dtype.itemsize != end:
        _fail(path, f"member {member.name} has {end - offset} bytes of data, but shape {shape} of {dtype}")
    return np.frombuffer(data, dtype, count=shape[0], offset=offset)


def _unusable(error: UnreadableError | ContentError) -> DataError:
    if isinstance(error, ContentError):
        return DataError(f"{error}; {_ANEW}")
    return DataError(
        f"{error.where}: the manifest names this shard, but it cannot be read: {error.reason}; copy it again"
    )


def _fail(path: str, what: str, fix: str = _ANEW) -> NoReturn:
    raise DataError(f"{path}: {what}; {fix}")
