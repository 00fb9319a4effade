"""Shuffle documents over shards, for any amount of text in bounded memory; the result is the same for any workers.

Every document gets a 64-bit key, a seeded hash of its name; the shards of a split hold its documents sorted by key.

First pass: each worker tokenizes chunks of the corpus and appends their documents to its own spool files, one pair for
each range of keys (bucket): the tokens, and an index with one record per document. Second pass: bucket by bucket, the
indices of all workers are sorted and cut into shards; any worker then writes a shard from the spooled tokens, its
documents one after another or packed into rows. So the result depends neither on the number of workers nor on the
number of buckets.

Spool files outlive the process that wrote them. A record counts only if the journal lists its chunk as completed by the
worker that owns the file. So a chunk that a killed worker left half-spooled, and that another worker spooled again,
counts once. Each record has a checksum of its tokens, since files may lack their last blocks after a machine crash.

Memory: the first pass holds a few MB of text per worker, or the longest document; the second pass holds one shard per
worker and the index of one bucket.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.prepare.documents import CHUNK_BYTES, Chunk, Document, read_documents
from dcscale.data.prepare.packing import Row, pack_best_fit, pack_one_per_row
from dcscale.data.shards.manifest import ShardInfo
from dcscale.data.shards.shard import write_shard
from dcscale.data.tokenizers import Tokenizer, load_tokenizer

TRAIN, VALIDATION = "train", "validation"
PACKINGS = {"best-fit": pack_best_fit, "one-per-sequence": pack_one_per_row}

# A document in an index file. The layout is on disk: changing it requires a new _STATE_VERSION in build.py.
_RECORD = np.dtype(
    [("key", "<u8"), ("number", "<u8"), ("tokens", "<u8"), ("text_bytes", "<u8"), ("chunk", "<u4"), ("crc", "<u4")]
)
# In memory also the first token in its token file, and the number of that file.
_LOCATED_RECORD = np.dtype([*_RECORD.descr, ("start", "<u8"), ("file", "<u4")])

_failures = 0
"""Chunks that failed in this process. After each it starts new files, since the old ones may end inside a record."""


@dataclass(frozen=True)
class SpoolTask:
    """Settings of the first pass, the same for every chunk."""

    spool: Path
    run_id: str
    """Unique to each call that uses the spool; keeps new files apart from those of a killed call."""
    tokenizer: str
    fingerprint: str
    eos_token: str | None
    dtype: str
    text_field: str
    skip_bad_rows: bool
    hold_out: float
    seed: int
    buckets: int
    batch_chars: int = CHUNK_BYTES
    """Characters of text that are tokenized together."""


class SpooledChunk(NamedTuple):
    """Result of the first pass for a chunk. The journal stores it as a list: keep the order of the fields."""

    number: int
    owner: str
    """Identifies the spool files of the worker."""
    bytes: int
    documents: dict[str, int]
    """Split -> number of its documents that are kept."""
    empty: int
    bad_rows: dict[str, dict[str, int]]
    """Split -> reason -> number of its rows that are left out."""
    first_bad_row: dict[str, str]
    """Reason -> name of its first row."""


class ShardPlan(NamedTuple):
    """A shard to write."""

    split: str
    name: str
    files: list[Path]
    """Token files that its documents are in."""
    records: np.ndarray
    """Its documents in order, [documents] of ``_LOCATED_RECORD``; ``file`` indexes ``files``."""


@dataclass(frozen=True)
class ShardLayout:
    """Settings of the second pass, the same for every shard."""

    dtype: str
    bundle_tokens: int
    eos_id: int
    seed: int
    packing: str | None
    """One of ``PACKINGS``, or None for uncut documents one after another."""
    row_tokens: int | None
    """Tokens of a row; None without packing."""


class WrittenShard(NamedTuple):
    """A shard on disk, with figures that the manifest does not have. The journal stores it in this order."""

    info: ShardInfo
    max_token_id: int
    documents: int
    """Documents in it; with packing, ``info`` counts their fragments and the padding instead."""
    cut_documents: int
    """Documents that are cut into several rows."""
    padding_tokens: int
    """End-of-document tokens that only fill rows."""


def document_key(name: str, purpose: str, seed: int = 0) -> int:
    """64-bit hash of a document's name, independent for each purpose and seed."""
    # surrogateescape: file names need not be UTF-8.
    content = f"{purpose}\0{seed}\0{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def split_of(name: str, hold_out: float) -> str:
    """``train`` or ``validation``; depends on the document's name alone, not on the rest of the corpus or the seed."""
    return VALIDATION if document_key(name, "hold-out") < hold_out * 2.0**64 else TRAIN


@lru_cache(maxsize=1)
def _tokenizer(spec: str, eos_token: str | None, fingerprint: str) -> Tokenizer:
    """The tokenizer, loaded once per worker process; ``fingerprint`` is the one that the manifest will contain."""
    tokenizer = load_tokenizer(spec, eos_token)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{spec}: was changed while shards were built with it; run again")
    return tokenizer


def spool_chunk(task: SpoolTask, numbered: tuple[int, Chunk]) -> SpooledChunk:
    """Run the first pass over one chunk, given with its number; the chunk is complete when this returns."""
    global _failures
    try:
        return _spool_chunk(task, *numbered, owner=f"{task.run_id}_{os.getpid()}_{_failures}")
    except BaseException:
        _failures += 1
        raise


def _spool_chunk(task: SpoolTask, number: int, chunk: Chunk, owner: str) -> SpooledChunk:
    kept, empty = {TRAIN: 0, VALIDATION: 0}, 0
    bad_rows: dict[str, Counter[str]] = {TRAIN: Counter(), VALIDATION: Counter()}
    first_bad_row: dict[str, str] = {}
    read = read_documents(chunk, text_field=task.text_field, skip_bad_rows=task.skip_bad_rows)
    for batch in _batches(read, task.batch_chars):
        for document in batch:
            if document.text is None:
                bad_rows[split_of(document.name, task.hold_out)][document.bad_row] += 1
                first_bad_row.setdefault(document.bad_row, document.name)
        documents = [document for document in batch if document.text]
        encoded = _tokenizer(task.tokenizer, task.eos_token, task.fingerprint).encode_documents(
            [document.text for document in documents]
        )
        groups: dict[tuple[str, int], list[tuple[np.ndarray, tuple[int, ...]]]] = defaultdict(list)
        for document, tokens in zip(documents, encoded):
            if len(tokens) > 1:  # otherwise the text has no token besides the end-of-document token
                tokens = tokens.astype(task.dtype)
                # The purpose "scatter" decides the order of documents: changing it would change all shards.
                key = document_key(document.name, "scatter", task.seed)
                text_bytes, crc = len(document.text.encode()), zlib.crc32(tokens)
                record = (key, document.number, len(tokens), text_bytes, number, crc)
                # Buckets are equal ranges of keys, in ascending order: bucket = floor(key / 2**64 * buckets).
                bucket = key * task.buckets >> 64
                groups[split_of(document.name, task.hold_out), bucket].append((tokens, record))
        for (split, bucket), group in groups.items():
            kept[split] += len(group)
            stem = task.spool / f"{split}-{bucket:04d}-{owner}"
            with open(stem.with_suffix(".tokens"), "ab") as file:
                file.writelines(tokens.data for tokens, _ in group)
            with open(stem.with_suffix(".index"), "ab") as file:
                file.write(np.array([record for _, record in group], dtype=_RECORD).tobytes())
        empty += len(batch) - sum(map(len, groups.values())) - sum(document.text is None for document in batch)
    return SpooledChunk(number, owner, chunk.bytes, kept, empty, bad_rows, first_bad_row)


def _batches(documents: Iterable[Document], batch_chars: int) -> Iterator[list[Document]]:
    """Group documents into batches of about ``batch_chars`` characters; compressed chunks are larger once unpacked."""
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "")
        if size >= batch_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def plan_shards(spool: Path, split: str, shard_tokens: int, chunks: Iterable[SpooledChunk]) -> Iterator[ShardPlan]:
    """Plan the second pass: yield the shards of a split, each of at least ``shard_tokens`` tokens except the last.

    A shard ends with the document that fills it, so it exceeds ``shard_tokens`` by less than one document.

    Args:
        spool: folder of the spool files.
        split: ``train`` or ``validation``.
        shard_tokens: minimum tokens of a shard.
        chunks: the complete chunks; records of other chunks in the spool files are ignored.

    Raises:
        DataError: the spool files do not hold exactly the documents of ``chunks``.
    """
    owned: dict[str, list[int]] = defaultdict(list)
    expected = found = 0
    for chunk in chunks:
        owned[chunk.owner].append(chunk.number)
        expected += chunk.documents[split]
    files: list[Path] = []
    # Documents that are read but not in a shard yet, sorted by key; a shard may continue in the next bucket.
    pending = np.empty(0, dtype=_LOCATED_RECORD)
    shards = 0
    buckets = sorted({path.name.rsplit("-", 1)[0] for path in spool.glob(f"{split}-*.index")})
    for bucket in buckets:
        parts = [pending]
        for index in sorted(spool.glob(f"{bucket}-*.index")):
            records = np.fromfile(index, dtype=_RECORD)
            located = np.empty(len(records), dtype=_LOCATED_RECORD)
            for name in _RECORD.names:
                located[name] = records[name]
            located["start"] = np.cumsum(records["tokens"]) - records["tokens"]
            located["file"] = len(files)
            files.append(index.with_suffix(".tokens"))
            parts.append(located[np.isin(located["chunk"], owned[index.stem.rpartition("-")[2]])])
            found += len(parts[-1])
        pending = np.concatenate(parts)
        pending = pending[np.lexsort((pending["number"], pending["key"]))]  # by key; the number breaks ties
        ends, begin, planned_tokens = np.cumsum(pending["tokens"]), 0, 0
        while (stop := int(np.searchsorted(ends, planned_tokens + shard_tokens)) + 1) <= len(pending):
            yield _plan(split, shards, files, pending[begin:stop])
            shards, begin, planned_tokens = shards + 1, stop, int(ends[stop - 1])
        pending = pending[begin:]
    if len(pending):
        yield _plan(split, shards, files, pending)
    if found != expected:
        raise _corrupt_spool(spool, f"there are {found} documents of {split} instead of {expected}")


def _plan(split: str, number: int, files: list[Path], records: np.ndarray) -> ShardPlan:
    # Keep only the files that the shard needs, since the plan is sent to a worker, and renumber them.
    used, renumbered = np.unique(records["file"], return_inverse=True)
    records = records.copy()
    records["file"] = renumbered
    return ShardPlan(split, f"shard-{number:06d}.tar", [files[i] for i in used], records)


def _corrupt_spool(spool: Path, problem: str) -> DataError:
    return DataError(
        f"{spool}: is corrupt: {problem}, as after a machine crash or on a full disk; "
        f"remove the folder {spool.parent} and run again"
    )


def write_planned_shard(folder: Path, layout: ShardLayout, plan: ShardPlan) -> WrittenShard:
    """Run the second pass for one shard: write it to ``folder``.

    Raises:
        DataError: spooled tokens differ from their checksum.
    """
    prefix = plan.name.removesuffix(".tar")
    documents = _spooled_documents(plan, layout.dtype)
    cut_documents = padding_tokens = 0
    # A unit is never divided between two samples: a document, or a row.
    units = ([document] for document in documents)
    if layout.packing is not None:
        rows = PACKINGS[layout.packing](plan.records["tokens"], layout.row_tokens)
        cut_documents = sum(len(document) > layout.row_tokens for document in documents)
        padding_tokens = len(rows) * layout.row_tokens - sum(stop - start for row in rows for _, start, stop in row)
        units = _padded_rows(documents, rows, layout, document_key(f"{plan.split}/{plan.name}", "rows", layout.seed))

    def bundles() -> Iterator[tuple[str, list[np.ndarray]]]:
        bundle, size, number = [], 0, 0
        for unit in units:
            bundle += unit
            size += sum(map(len, unit))
            if size >= layout.bundle_tokens:
                yield f"{prefix}-{number:05d}", bundle
                bundle, size, number = [], 0, number + 1
        if bundle:
            yield f"{prefix}-{number:05d}", bundle

    text_bytes = int(plan.records["text_bytes"].sum())
    info = write_shard(folder, plan.name, bundles(), dtype=layout.dtype, text_bytes=text_bytes)
    largest = max(int(document.max()) for document in documents)
    return WrittenShard(info, largest, len(documents), cut_documents, padding_tokens)


def _spooled_documents(plan: ShardPlan, dtype: str) -> list[np.ndarray]:
    """The documents of a shard [tokens] each, as views into the spool files, verified by their checksums."""
    spools = [_map_tokens(path, dtype) for path in plan.files]
    documents = []
    for record in plan.records:
        document = spools[record["file"]][int(record["start"]) : int(record["start"] + record["tokens"])]
        if not 0 < len(document) == record["tokens"] or zlib.crc32(document) != record["crc"]:
            path = plan.files[record["file"]]
            raise _corrupt_spool(path.parent, f"tokens of {path.name} from {record['start']} on differ from the index")
        documents.append(document)
    return documents


def _map_tokens(path: Path, dtype: str) -> np.ndarray:
    """Memory-map the complete tokens of a spool file; a killed worker may have left half a token, or an empty file."""
    count = path.stat().st_size // np.dtype(dtype).itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def _padded_rows(
    documents: list[np.ndarray], rows: list[Row], layout: ShardLayout, seed: int
) -> Iterator[list[np.ndarray]]:
    """Yield the rows in random order, each padded with documents of one end-of-document token."""
    eos = np.array([layout.eos_id], dtype=layout.dtype)
    for number in np.random.default_rng(seed).permutation(len(rows)):
        row = [documents[document][start:stop] for document, start, stop in rows[number]]
        yield row + [eos] * (layout.row_tokens - sum(map(len, row)))
