"""Scattering documents over shards: a shuffle of any amount of text in bounded memory, the same for any workers.

Every document gets a 64-bit key, a seeded hash of its name; a folder of shards holds its documents sorted by key.

First pass: each worker tokenises chunks of the corpus and appends their documents to its own spool files, one pair for
each range of keys (bucket): the tokens, and an index of one record a document. Second pass: bucket after bucket, the
indices of all workers are sorted and cut into shards; each shard is then written from the spooled tokens by any worker.
So neither the number of workers nor the number of buckets can be seen in the result.

Memory: the first pass holds one chunk a worker; the second one shard a worker, and the index of one bucket.
"""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dcscale.data.corpus import Chunk, read_documents
from dcscale.data.errors import DataError
from dcscale.data.manifest import ShardInfo
from dcscale.data.shards import write_shard
from dcscale.data.tokenizers import Tokenizer, load_tokenizer

TRAIN, VALIDATION = "train", "validation"

_INDEX = np.dtype([("key", "<u8"), ("number", "<u8"), ("tokens", "<u8"), ("text_bytes", "<u8")])
_PLACE = np.dtype([*_INDEX.descr, ("at", "<u8"), ("file", "<u4")])


@dataclass(frozen=True)
class SpoolTask:
    """What the first pass does with every chunk."""

    spool: Path
    tokenizer: str
    fingerprint: str
    eos_token: str | None
    dtype: str
    text_field: str
    skip_undecodable: bool
    hold_out: float
    seed: int
    buckets: int


class SpoolCount(NamedTuple):
    """What became of a chunk."""

    bytes: int
    empty: int
    undecodable: tuple[str, ...]


class ShardPlan(NamedTuple):
    """A shard to be written: documents by spool file, first token and number of tokens."""

    name: str
    files: list[Path]
    places: np.ndarray


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


def spool_chunk(task: SpoolTask, chunk: Chunk) -> SpoolCount:
    """First pass over one chunk."""
    documents, empty, undecodable = [], 0, []
    for document in read_documents(chunk, text_field=task.text_field, skip_undecodable=task.skip_undecodable):
        if document.text is None:
            undecodable.append(document.name)
        elif not document.text:
            empty += 1
        else:
            documents.append(document)

    groups: dict[tuple[str, int], list[tuple[np.ndarray, tuple[int, ...]]]] = defaultdict(list)
    encoded = _tokenizer(task.tokenizer, task.eos_token, task.fingerprint).encode_documents(
        [document.text for document in documents]
    )
    for document, tokens in zip(documents, encoded):
        if len(tokens) == 1:  # text that gives nothing but the end of the document
            empty += 1
            continue
        key = document_key(document.name, "scatter", task.seed)
        record = (key, document.number, len(tokens), len(document.text.encode()))
        part = part_of(document.name, task.hold_out)
        groups[part, key * task.buckets >> 64].append((tokens.astype(task.dtype), record))
    for (part, bucket), group in groups.items():
        stem = task.spool / f"{part}-{bucket:04d}-{os.getpid()}"
        with open(stem.with_suffix(".tokens"), "ab") as file:
            file.writelines(tokens.data for tokens, _ in group)
        with open(stem.with_suffix(".index"), "ab") as file:
            file.write(np.array([record for _, record in group], dtype=_INDEX).tobytes())
    return SpoolCount(chunk.bytes, empty, tuple(undecodable))


def plan_shards(spool: Path, part: str, shard_tokens: int) -> Iterator[ShardPlan]:
    """Second pass, planning: the shards of a part, each of at least ``shard_tokens`` tokens but the last.

    A shard ends with the document that fills it, so it exceeds ``shard_tokens`` by less than one document.
    """
    files: list[Path] = []
    waiting = np.empty(0, dtype=_PLACE)
    number = 0
    buckets = sorted({path.name.rsplit("-", 1)[0] for path in spool.glob(f"{part}-*.index")})
    for bucket in buckets:
        found = [waiting]
        for index in sorted(spool.glob(f"{bucket}-*.index")):
            records = np.fromfile(index, dtype=_INDEX)
            places = np.empty(len(records), dtype=_PLACE)
            for name in _INDEX.names:
                places[name] = records[name]
            places["at"] = np.cumsum(records["tokens"]) - records["tokens"]
            places["file"] = len(files)
            files.append(index.with_suffix(".tokens"))
            found.append(places)
        waiting = np.concatenate(found)
        waiting = waiting[np.lexsort((waiting["number"], waiting["key"]))]
        ends, begin, taken = np.cumsum(waiting["tokens"]), 0, 0
        while (stop := int(np.searchsorted(ends, taken + shard_tokens)) + 1) <= len(waiting):
            yield _plan(number, files, waiting[begin:stop])
            number, begin, taken = number + 1, stop, int(ends[stop - 1])
        waiting = waiting[begin:]
    if len(waiting):
        yield _plan(number, files, waiting)


def _plan(number: int, files: list[Path], places: np.ndarray) -> ShardPlan:
    used, compact = np.unique(places["file"], return_inverse=True)
    places = places.copy()
    places["file"] = compact
    return ShardPlan(f"shard-{number:06d}.tar", [files[i] for i in used], places)


def write_planned_shard(folder: Path, dtype: str, bundle_tokens: int, plan: ShardPlan) -> tuple[ShardInfo, int]:
    """Second pass, writing: returns the shard's entry and its largest token id."""
    spools = [np.memmap(path, dtype=dtype, mode="r") for path in plan.files]
    prefix = plan.name.removesuffix(".tar")
    largest = 0

    def bundles() -> Iterator[tuple[str, list[np.ndarray]]]:
        nonlocal largest
        bundle, size, number = [], 0, 0
        for place in plan.places:
            tokens = spools[place["file"]][int(place["at"]) : int(place["at"] + place["tokens"])]
            largest = max(largest, int(tokens.max()))
            bundle.append(tokens)
            size += len(tokens)
            if size >= bundle_tokens:
                yield f"{prefix}-{number:05d}", bundle
                bundle, size, number = [], 0, number + 1
        if bundle:
            yield f"{prefix}-{number:05d}", bundle

    text_bytes = int(plan.places["text_bytes"].sum())
    return write_shard(folder, plan.name, bundles(), dtype=dtype, text_bytes=text_bytes), largest
