"""Read shards completely and measure what they hold, to verify a manifest or to write one."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from dcscale.data.errors import DataError
from dcscale.data.prepare.pool import worker_pool
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, ShardInfo, read_manifest
from dcscale.data.shards.shard import read_shard, token_samples
from dcscale.data.shards.text import TextReader, open_text_reader
from dcscale.data.storage import LocalStorage, Storage, UnreadableError, open_storage
from dcscale.data.tokenizers import load_shard_tokenizer


@dataclass
class ShardInspection:
    """What was measured in a shard."""

    defects: list[str] = field(default_factory=list)
    info: ShardInfo | None = None
    """Its correct entry in a manifest; None if the shard cannot be read completely."""
    max_token_id: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a document -> number of such documents, padding excluded."""
    padding: int = 0
    """Documents of one end-of-document token that only fill rows."""
    without_eos: int = 0
    """Documents whose last token is not the end-of-document token."""
    bad_rows: Counter[str] = field(default_factory=Counter)
    """Reason -> samples of text that are left out because their text cannot be used."""


@dataclass(frozen=True)
class Inspection:
    """What was measured in shards."""

    root: str
    manifest: Manifest
    shards: list[ShardInspection]
    defects: list[str]
    """Everything that is wrong, with single shards and with the manifest."""
    unlisted: list[str] = field(default_factory=list)
    """Tars in the folder that are not in the manifest."""

    def summary(self) -> list[str]:
        """Lines to print: everything but the defects."""
        manifest, tokenizer = self.manifest, self.manifest.tokenizer
        infos = [shard.info for shard in self.shards if shard.info]
        size, samples, documents, tokens, text_bytes = (
            sum(getattr(info, name) for info in infos)
            for name in ("bytes", "samples", "documents", "tokens", "text_bytes")
        )
        padding, without_eos = (
            sum(getattr(shard, name) for shard in self.shards) for name in ("padding", "without_eos")
        )
        content, packing = "tokens", "none; documents are packed when they are read"
        if manifest.text:
            field = f"field {manifest.text.field!r} of " if manifest.text.field else ""
            content = f"text, {field}KEY.{manifest.text.member}, tokenized whenever it is read"
        if manifest.row_tokens and tokens:
            rows = f"{tokens // manifest.row_tokens:,} rows of {manifest.row_tokens:,} tokens"
            # A padding document is one token, so tokens of documents / all tokens = 1 - padding / tokens.
            packing = f"{rows}, {1 - padding / tokens:.2%} filled; documents below are fragments of documents"
        shares = (0.01, 0.1, 0.5, 0.9, 0.99)
        lengths = [f"{share:.0%} up to {self._length_quantile(share):,}" for share in shares if documents]
        text = f", of {text_bytes:,} bytes of text, {text_bytes / tokens:.2f} per token" if text_bytes else ""
        lines = [
            self.root,
            f"  shards      {len(infos):,} of {len(manifest.shards):,} read; {samples:,} samples in {size:,} bytes",
            f"  content     {content}",
            f"  tokens      {tokens:,} of {manifest.dtype}{text}",
            f"  largest id  {max((s.max_token_id for s in self.shards), default=0):,}",
            f"  tokenizer   {tokenizer.spec}, {tokenizer.vocab_size:,} tokens, SHA-256 {tokenizer.fingerprint[:16]}...",
            f"  packing     {packing}",
            f"  documents   {documents - padding:,}; {without_eos:,} do not end with token {tokenizer.eos_id:,}",
            f"  lengths     {', '.join(lengths) or 'none'} tokens",
        ]
        if manifest.skipped_rows:
            reasons = ", ".join(f"{reason} {count:,}" for reason, count in manifest.skipped_rows.items())
            lines.append(f"  left out    {sum(manifest.skipped_rows.values()):,} rows of the input: {reasons}")
        if self.unlisted:
            lines.append(f"  {len(self.unlisted):,} tars in the folder are not in the manifest: {self.unlisted[0]}")
        return lines

    def _length_quantile(self, share: float) -> int:
        """The smallest length such that at least this share of the documents is not longer."""
        lengths = sum((shard.lengths for shard in self.shards), Counter())
        sizes = np.array(sorted(lengths))
        counts = np.cumsum([lengths[size] for size in sizes])
        return int(sizes[np.searchsorted(counts, share * counts[-1])])


def inspect_shards(
    root: str | Path, names: Collection[str] | None = None, *, workers: int = 1, progress: bool = False
) -> Inspection:
    """Read the shards of a manifest and compare everything with it.

    Args:
        root: folder or address of the manifest, see :func:`dcscale.data.storage.open_storage`.
        names: the shards to read; None reads all.
        workers: number of processes; each holds one shard in memory.
        progress: show a progress bar.

    Raises:
        DataError: the manifest is missing or invalid, or has no shard of a name in ``names``. What is wrong with the
            shards themselves is returned, not raised.
    """
    storage = open_storage(root)
    manifest = read_manifest(storage)
    defects = []
    try:
        load_shard_tokenizer(storage, manifest)
    except DataError as error:
        defects.append(str(error))
    selected = _select(storage, manifest, names)
    shards = measure_shards(root, replace(manifest, shards=()), selected, workers, progress)
    defects += [defect for shard in shards for defect in shard.defects]
    largest = max(shard.max_token_id for shard in shards)
    # The largest id is only known if all shards were read completely.
    if not defects and names is None and largest != manifest.max_token_id:
        where = storage.location(MANIFEST_NAME)
        defects.append(f"{where}: max_token_id is {manifest.max_token_id}, but the largest in the shards is {largest}")
    bad_rows = sum((shard.bad_rows for shard in shards), Counter())
    if not defects and names is None and manifest.text and bad_rows != Counter(manifest.skipped_rows):
        where = storage.location(MANIFEST_NAME)
        defects.append(f"{where}: skipped_rows is {manifest.skipped_rows}, but the shards have {dict(bad_rows)}")
    unlisted = []
    if isinstance(storage, LocalStorage):
        present = {path.relative_to(storage.folder).as_posix() for path in storage.folder.rglob("*.tar")}
        unlisted = sorted(present - {info.name for info in manifest.shards})
    return Inspection(str(storage), manifest, shards, defects, unlisted)


class SampleDocument(NamedTuple):
    """A document to show."""

    shard: str
    number: int
    """Its number in the shard, from 0."""
    tokens: int
    """Its length in tokens."""
    text: str


def sample_documents(root: str | Path, names: Collection[str] | None = None) -> Iterator[SampleDocument]:
    """Yield the documents of the shards of a manifest in their order, decoded; padding is left out.

    Args:
        root: folder or address of the manifest.
        names: the shards to read; None reads all.

    Raises:
        DataError: as :func:`inspect_shards`, or a shard differs from its entry in the manifest.
    """
    storage = open_storage(root)
    manifest = read_manifest(storage)
    tokenizer, text = load_shard_tokenizer(storage, manifest), open_text_reader(storage, manifest)
    for info in _select(storage, manifest, names):
        vocab_size = manifest.tokenizer.vocab_size
        found = read_shard(storage, info, dtype=manifest.dtype, vocab_size=vocab_size, verify=True, text=text)
        for number, tokens in enumerate(found):
            if manifest.row_tokens is None or tokens.tolist() != [tokenizer.eos_id]:
                yield SampleDocument(
                    storage.location(info.name), number, len(tokens), tokenizer.decode(tokens.tolist())
                )


def _select(storage: Storage, manifest: Manifest, names: Collection[str] | None) -> list[ShardInfo]:
    if unknown := set(names or ()) - {info.name for info in manifest.shards}:
        raise DataError(f"{storage.location(MANIFEST_NAME)}: has no shard {sorted(unknown)[0]}; check the name")
    return [info for info in manifest.shards if names is None or info.name in names]


def measure_shards(
    root: str | Path, header: Manifest, shards: Sequence[ShardInfo | str], workers: int, progress: bool
) -> list[ShardInspection]:
    """Read shards and return what they hold, in the same order.

    Args:
        root: folder or address that the shards' names are relative to.
        header: their manifest, without its shards.
        shards: entries to compare the shards with, or only their names.
        workers: number of processes; each holds one shard in memory.
        progress: show a progress bar.
    """
    found = []
    with (
        worker_pool(workers) as pool_map,
        tqdm(desc="read", total=len(shards), unit=" shards", disable=not progress) as bar,
    ):
        for shard in pool_map(partial(_measure_shard, root, header), shards):
            found.append(shard)
            bar.update()
    return found


@lru_cache(maxsize=1)
def _opened(root: str | Path, header: Manifest) -> tuple[Storage, TextReader | None]:
    """The storage and, for shards of text, the reader with its tokenizer; opened once per worker process."""
    storage = open_storage(root)
    return storage, open_text_reader(storage, header)


def _measure_shard(root: str | Path, header: Manifest, shard: ShardInfo | str) -> ShardInspection:
    storage, text = _opened(root, header)
    name = shard if isinstance(shard, str) else shard.name
    where, found = storage.location(name), ShardInspection()
    try:
        data = storage.read(name)
    except UnreadableError as error:
        found.defects.append(str(error))
        return found
    entry = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        entry |= _measure_samples(where, data, header, text, found)
        if text is None and isinstance(shard, ShardInfo):
            entry["text_bytes"] = shard.text_bytes  # unknown from tokens, so take the manifest's
    except DataError as error:
        found.defects.append(str(error))
    else:
        found.info = ShardInfo(**entry)
    # Also after an error: size and checksum show whether the file was corrupted after it was written.
    if isinstance(shard, ShardInfo):
        for name, value in entry.items():
            if value != (expected := getattr(shard, name)):
                found.defects.append(f"{where}: its {name} is {value}, but the manifest says {expected}")
    return found


def _measure_samples(
    where: str, data: bytes, header: Manifest, text: TextReader | None, found: ShardInspection
) -> dict[str, int]:
    """Add what the samples of a shard hold to ``found``; return the counts for its manifest entry.

    Raises:
        DataError: the shard is empty or corrupt.
    """
    samples = text_bytes = 0
    all_lengths, out_of_vocabulary = [], []
    eos_id, vocab_size = header.tokenizer.eos_id, header.tokenizer.vocab_size
    for key, tokens, lengths, size in _samples(where, data, header, text, found.bad_rows):
        samples, text_bytes = samples + 1, text_bytes + size
        all_lengths.append(lengths)
        largest = int(tokens.max())
        found.max_token_id = max(found.max_token_id, largest)
        if largest >= vocab_size:
            out_of_vocabulary.append(f"{largest} in sample {key}")
        has_eos = tokens[np.cumsum(lengths, dtype=np.int64) - 1] == eos_id  # [documents]
        found.without_eos += int(np.count_nonzero(~has_eos))
        if header.row_tokens is not None:
            padding = has_eos & (lengths == 1)
            found.padding += int(np.count_nonzero(padding))
            lengths = lengths[~padding]
        sizes, counts = np.unique(lengths, return_counts=True)
        found.lengths.update(dict(zip(sizes.tolist(), counts.tolist())))
    if not samples:
        raise DataError(f"{where}: it holds no document; leave it out")
    if out_of_vocabulary:
        found.defects.append(
            f"{where}: {len(out_of_vocabulary)} samples have token ids that are not below tokenizer.vocab_size, "
            f"{vocab_size}: such as {out_of_vocabulary[0]}"
        )
    ends = np.cumsum(np.concatenate(all_lengths), dtype=np.int64)
    total = int(ends[-1])
    # No document crosses a row's end if and only if every multiple of row_tokens up to the total is a document's end.
    if header.row_tokens is not None and np.count_nonzero(ends % header.row_tokens == 0) * header.row_tokens != total:
        found.defects.append(f"{where}: a document crosses the end of a row of {header.row_tokens} tokens")
    return {"samples": samples, "documents": len(ends), "tokens": total, "text_bytes": text_bytes}


def _samples(
    where: str, data: bytes, header: Manifest, text: TextReader | None, bad_rows: Counter[str]
) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """(key, tokens [n], lengths [documents], bytes of the text or 0 if unknown) of each sample."""
    if text is None:
        for key, tokens, lengths in token_samples(where, data, header.dtype):
            yield key, tokens, lengths, 0
    else:
        for key, string, tokens in text.documents(where, data, bad_rows):
            yield key, tokens, np.array([len(tokens)]), len(string.encode())
