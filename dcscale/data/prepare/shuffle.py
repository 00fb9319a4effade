"""Scattering documents over shards: a shuffle of any amount of text in bounded memory, the same for any workers.

Every document gets a 64-bit key, a seeded hash of its name; a folder of shards holds its documents sorted by key.

First pass: each worker tokenises chunks of the corpus and appends their documents to its own spool files, one pair for
each range of keys (bucket): the tokens, and an index of one record a document. Second pass: bucket after bucket, the
indices of all workers are sorted and cut into shards; each shard is then written from the spooled tokens by any worker,
its documents one after another or packed into rows. So neither the number of workers nor the number of buckets can be
seen in the result.

Spool files outlive the process that wrote them. A record counts if the caller knows that its chunk was completed by the
worker whose file it is in; so a chunk that a killed worker left half-spooled, and another one did again, counts once.
Each record has its tokens' checksum, since files may lack their last parts after a crash of the machine.

Memory: the first pass holds a few MB of text a worker, or the longest document; the second one shard a worker, and the
index of one bucket.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections import defaultdict
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

_INDEX = np.dtype(
    [("key", "<u8"), ("number", "<u8"), ("tokens", "<u8"), ("text_bytes", "<u8"), ("chunk", "<u4"), ("crc", "<u4")]
)
_PLACE = np.dtype([*_INDEX.descr, ("at", "<u8"), ("file", "<u4")])

_failures = 0
"""Chunks that failed in this process. After each it writes to other files, since the old ones may end in a record."""


@dataclass(frozen=True)
class SpoolTask:
    """What the first pass does with every chunk."""

    spool: Path
    run: str
    """Unique to each call that uses the spool; keeps the files of a killed call apart from those that are written."""
    tokenizer: str
    fingerprint: str
    eos_token: str | None
    dtype: str
    text_field: str
    skip_undecodable: bool
    hold_out: float
    seed: int
    buckets: int


class SpooledChunk(NamedTuple):
    """What became of a chunk."""

    number: int
    owner: str
    """Names the worker's spool files."""
    bytes: int
    documents: dict[str, int]
    """Part -> documents that are kept in it."""
    empty: int
    undecodable: list[str]


class ShardPlan(NamedTuple):
    """A shard to be written: documents by spool file, first token and number of tokens."""

    part: str
    name: str
    files: list[Path]
    places: np.ndarray


@dataclass(frozen=True)
class Layout:
    """How the second pass writes every shard."""

    dtype: str
    bundle_tokens: int
    eos_id: int
    seed: int
    packing: str | None
    """One of ``PACKINGS``, or None for whole documents one after another."""
    row_tokens: int | None
    """Tokens of a row; None without packing."""


class WrittenShard(NamedTuple):
    """A shard on disk, and what the manifest does not say about it."""

    info: ShardInfo
    max_token_id: int
    documents: int
    """Documents in it; rows hold parts of them, and filling."""
    cut: int
    """Documents that lie in several rows."""
    filling: int
    """Tokens that only fill rows."""


def document_key(name: str, purpose: str, seed: int = 0) -> int:
    """64-bit hash of a document's name, independent for each purpose and seed."""
    content = f"{purpose}\0{seed}\0{name}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def part_of(name: str, hold_out: float) -> str:
    """``train`` or ``validation``; follows from the document's name alone, whatever else is in the corpus."""
    return VALIDATION if document_key(name, "hold-out") < hold_out * 2.0**64 else TRAIN


@lru_cache(maxsize=1)
def _tokenizer(spec: str, eos_token: str | None, fingerprint: str) -> Tokenizer:
    """Loaded once in each worker process; ``fingerprint`` is that of the tokenizer which the manifest will name."""
    tokenizer = load_tokenizer(spec, eos_token)
    if tokenizer.fingerprint != fingerprint:
        raise DataError(f"{spec}: was changed while shards were made with it; run again")
    return tokenizer


def spool_chunk(task: SpoolTask, numbered: tuple[int, Chunk]) -> SpooledChunk:
    """First pass over one chunk; it is complete, and counts, when this returns."""
    global _failures
    try:
        return _spool_chunk(task, *numbered, owner=f"{task.run}_{os.getpid()}_{_failures}")
    except BaseException:
        _failures += 1
        raise


def _spool_chunk(task: SpoolTask, number: int, chunk: Chunk, owner: str) -> SpooledChunk:
    kept, empty, undecodable = {TRAIN: 0, VALIDATION: 0}, 0, []
    for batch in _batches(read_documents(chunk, text_field=task.text_field, skip_undecodable=task.skip_undecodable)):
        undecodable += [document.name for document in batch if document.text is None]
        documents = [document for document in batch if document.text]
        encoded = _tokenizer(task.tokenizer, task.eos_token, task.fingerprint).encode_documents(
            [document.text for document in documents]
        )
        groups: dict[tuple[str, int], list[tuple[np.ndarray, tuple[int, ...]]]] = defaultdict(list)
        for document, tokens in zip(documents, encoded):
            if len(tokens) > 1:  # else the text gives nothing but the end of the document
                key, tokens = document_key(document.name, "scatter", task.seed), tokens.astype(task.dtype)
                text_bytes, crc = len(document.text.encode()), zlib.crc32(tokens)
                record = (key, document.number, len(tokens), text_bytes, number, crc)
                groups[part_of(document.name, task.hold_out), key * task.buckets >> 64].append((tokens, record))
        for (part, bucket), group in groups.items():
            kept[part] += len(group)
            stem = task.spool / f"{part}-{bucket:04d}-{owner}"
            with open(stem.with_suffix(".tokens"), "ab") as file:
                file.writelines(tokens.data for tokens, _ in group)
            with open(stem.with_suffix(".index"), "ab") as file:
                file.write(np.array([record for _, record in group], dtype=_INDEX).tobytes())
        empty += len(batch) - sum(map(len, groups.values()))
    return SpooledChunk(number, owner, chunk.bytes, kept, empty - len(undecodable), undecodable)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text or "")
        if size >= CHUNK_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def plan_shards(spool: Path, part: str, shard_tokens: int, chunks: Iterable[SpooledChunk]) -> Iterator[ShardPlan]:
    """Second pass, planning: the shards of a part, each of at least ``shard_tokens`` tokens but the last.

    A shard ends with the document that fills it, so it exceeds ``shard_tokens`` by less than one document.

    Args:
        spool: folder of the spool files.
        part: ``train`` or ``validation``.
        shard_tokens: see above.
        chunks: those that are complete; what else lies in the spool files is left out.
    """
    owned: dict[str, list[int]] = defaultdict(list)
    expected = found = 0
    for chunk in chunks:
        owned[chunk.owner].append(chunk.number)
        expected += chunk.documents[part]
    files: list[Path] = []
    waiting = np.empty(0, dtype=_PLACE)
    shards = 0
    buckets = sorted({path.name.rsplit("-", 1)[0] for path in spool.glob(f"{part}-*.index")})
    for bucket in buckets:
        entered = [waiting]
        for index in sorted(spool.glob(f"{bucket}-*.index")):
            records = np.fromfile(index, dtype=_INDEX)
            places = np.empty(len(records), dtype=_PLACE)
            for name in _INDEX.names:
                places[name] = records[name]
            places["at"] = np.cumsum(records["tokens"]) - records["tokens"]
            places["file"] = len(files)
            files.append(index.with_suffix(".tokens"))
            entered.append(places[np.isin(places["chunk"], owned[index.stem.rpartition("-")[2]])])
            found += len(entered[-1])
        waiting = np.concatenate(entered)
        waiting = waiting[np.lexsort((waiting["number"], waiting["key"]))]
        ends, begin, taken = np.cumsum(waiting["tokens"]), 0, 0
        while (stop := int(np.searchsorted(ends, taken + shard_tokens)) + 1) <= len(waiting):
            yield _plan(part, shards, files, waiting[begin:stop])
            shards, begin, taken = shards + 1, stop, int(ends[stop - 1])
        waiting = waiting[begin:]
    if len(waiting):
        yield _plan(part, shards, files, waiting)
    if found != expected:
        raise _damaged(spool, f"{found} documents of {part} instead of {expected}")


def _plan(part: str, number: int, files: list[Path], places: np.ndarray) -> ShardPlan:
    used, compact = np.unique(places["file"], return_inverse=True)
    places = places.copy()
    places["file"] = compact
    return ShardPlan(part, f"shard-{number:06d}.tar", [files[i] for i in used], places)


def _damaged(spool: Path, what: str) -> DataError:
    return DataError(
        f"{spool}: holds {what}, as after a crash of the machine or with a full disk; "
        f"remove the folder {spool.parent} and run again"
    )


def write_planned_shard(folder: Path, layout: Layout, plan: ShardPlan) -> WrittenShard:
    """Second pass, writing."""
    prefix = plan.name.removesuffix(".tar")
    documents = _spooled_documents(plan, layout.dtype)
    cut = filling = 0
    units = ([document] for document in documents)
    if layout.packing is not None:
        rows = PACKINGS[layout.packing](plan.places["tokens"], layout.row_tokens)
        cut = sum(len(document) > layout.row_tokens for document in documents)
        filling = len(rows) * layout.row_tokens - sum(stop - start for row in rows for _, start, stop in row)
        units = _filled_rows(documents, rows, layout, document_key(f"{plan.part}/{plan.name}", "rows", layout.seed))

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

    text_bytes = int(plan.places["text_bytes"].sum())
    info = write_shard(folder, plan.name, bundles(), dtype=layout.dtype, text_bytes=text_bytes)
    return WrittenShard(info, max(int(document.max()) for document in documents), len(documents), cut, filling)


def _spooled_documents(plan: ShardPlan, dtype: str) -> list[np.ndarray]:
    """The documents of a shard, views into the spool files, checked."""
    spools = [_map_tokens(path, dtype) for path in plan.files]
    documents = []
    for place in plan.places:
        document = spools[place["file"]][int(place["at"]) : int(place["at"] + place["tokens"])]
        if not 0 < len(document) == place["tokens"] or zlib.crc32(document) != place["crc"]:
            path = plan.files[place["file"]]
            raise _damaged(path.parent, f"{path.name}, whose tokens from {place['at']} on are not those written there")
        documents.append(document)
    return documents


def _map_tokens(path: Path, dtype: str) -> np.ndarray:
    """The whole tokens of a spool file; a worker may have been killed while it wrote one, or before the first."""
    count = path.stat().st_size // np.dtype(dtype).itemsize
    return np.memmap(path, dtype=dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)


def _filled_rows(documents: list[np.ndarray], rows: list[Row], layout: Layout, seed: int) -> Iterator[list[np.ndarray]]:
    """The rows in random order, each filled up with documents of nothing but their end."""
    end = np.array([layout.eos_id], dtype=layout.dtype)
    for number in np.random.default_rng(seed).permutation(len(rows)):
        row = [documents[document][start:stop] for document, start, stop in rows[number]]
        yield row + [end] * (layout.row_tokens - sum(map(len, row)))
