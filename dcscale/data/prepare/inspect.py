"""What shards really hold, found by reading all of them: to verify a manifest, or to write one."""

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
from dcscale.data.prepare.pool import processes
from dcscale.data.shards.manifest import MANIFEST_NAME, Manifest, ShardInfo, read_manifest
from dcscale.data.shards.shard import read_shard, samples_of
from dcscale.data.shards.text import TextReader, open_text
from dcscale.data.storage import LocalStorage, Storage, UnreadableError, open_storage
from dcscale.data.tokenizers import tokenizer_of_shards


@dataclass
class ShardSurvey:
    """What was found in a shard."""

    defects: list[str] = field(default_factory=list)
    info: ShardInfo | None = None
    """The entry that it should have in a manifest; None where it cannot be read to its end."""
    max_token_id: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of a document -> such documents, without those that only fill rows."""
    filling: int = 0
    """Documents that only fill rows."""
    unended: int = 0
    """Documents whose last token is not the one for that."""


@dataclass(frozen=True)
class Survey:
    """What was found in shards."""

    where: str
    manifest: Manifest
    shards: list[ShardSurvey]
    defects: list[str]
    """All that is wrong, of each shard and of the whole."""
    strays: list[str] = field(default_factory=list)
    """Tars in the folder that the manifest does not name."""

    def lines(self) -> list[str]:
        """All of this but the defects, to be printed."""
        manifest, tokenizer = self.manifest, self.manifest.tokenizer
        infos = [shard.info for shard in self.shards if shard.info]
        size, samples, documents, tokens, text_bytes = (
            sum(getattr(info, name) for info in infos)
            for name in ("bytes", "samples", "documents", "tokens", "text_bytes")
        )
        filling, unended = (sum(getattr(shard, name) for shard in self.shards) for name in ("filling", "unended"))
        content, packing = "tokens", "none; done when they are read"
        if manifest.text:
            field = f"field {manifest.text.field!r} of " if manifest.text.field else ""
            content = f"text, {field}KEY.{manifest.text.member}, tokenised whenever it is read"
        if manifest.row_tokens and tokens:
            rows = f"{tokens // manifest.row_tokens:,} rows of {manifest.row_tokens:,} tokens"
            packing = f"{rows}, {1 - filling / tokens:.2%} of them filled; documents below are parts of documents"
        shares = (0.01, 0.1, 0.5, 0.9, 0.99)
        lengths = [f"{share:.0%} up to {self._length_at(share):,}" for share in shares if documents]
        text = f", of {text_bytes:,} bytes of text, {text_bytes / tokens:.2f} a token" if text_bytes else ""
        return [
            self.where,
            f"  shards      {len(infos):,} of {len(manifest.shards):,} read; {samples:,} samples in {size:,} bytes",
            f"  content     {content}",
            f"  tokens      {tokens:,} of {manifest.dtype}{text}",
            f"  largest id  {max((s.max_token_id for s in self.shards), default=0):,}",
            f"  tokenizer   {tokenizer.spec}, {tokenizer.vocab_size:,} tokens, SHA-256 {tokenizer.fingerprint[:16]}...",
            f"  packing     {packing}",
            f"  documents   {documents - filling:,}; {unended:,} do not end with token {tokenizer.eos_id:,}",
            f"  lengths     {', '.join(lengths) or 'none'} tokens",
            *(
                f"  {len(self.strays):,} tars beside them are not in the manifest: {self.strays[0]}"
                for _ in self.strays[:1]
            ),
        ]

    def _length_at(self, share: float) -> int:
        """The tokens that this share of the documents does not exceed."""
        lengths = sum((shard.lengths for shard in self.shards), Counter())
        sizes = np.array(sorted(lengths))
        counts = np.cumsum([lengths[size] for size in sizes])
        return int(sizes[np.searchsorted(counts, share * counts[-1])])


def survey(
    root: str | Path, names: Collection[str] | None = None, *, workers: int = 1, progress: bool = False
) -> Survey:
    """Read the shards of a manifest and compare everything with it.

    Args:
        root: folder or address of the manifest, see :func:`dcscale.data.storage.open_storage`.
        names: the shards to be read; None reads all.
        workers: processes; each holds a shard.
        progress: show a progress bar.

    Raises:
        DataError: there is no manifest, it cannot be used, or it does not have a shard of such a name.
    """
    source = open_storage(root)
    manifest = read_manifest(source)
    defects = []
    try:
        tokenizer_of_shards(source, manifest)
    except DataError as error:
        defects.append(str(error))
    wanted = _chosen(source, manifest, names)
    shards = survey_shards(root, replace(manifest, shards=()), wanted, workers, progress)
    defects += [defect for shard in shards for defect in shard.defects]
    largest = max(shard.max_token_id for shard in shards)
    if not defects and names is None and largest != manifest.max_token_id:
        where = source.where(MANIFEST_NAME)
        defects.append(f"{where}: max_token_id is {manifest.max_token_id}, but the largest in the shards is {largest}")
    strays = []
    if isinstance(source, LocalStorage):
        beside = {path.relative_to(source.folder).as_posix() for path in source.folder.rglob("*.tar")}
        strays = sorted(beside - {info.name for info in manifest.shards})
    return Survey(str(source), manifest, shards, defects, strays)


class SampleDocument(NamedTuple):
    """A document to look at."""

    shard: str
    number: int
    """Its number in the shard, from 0."""
    tokens: int
    text: str


def sample_documents(root: str | Path, names: Collection[str] | None = None) -> Iterator[SampleDocument]:
    """The documents of the shards of a manifest in their order, decoded; those that only fill rows are left out.

    Raises:
        DataError: as :func:`survey`, or a shard differs from its entry in the manifest.
    """
    source = open_storage(root)
    manifest = read_manifest(source)
    tokenizer, text = tokenizer_of_shards(source, manifest), open_text(source, manifest)
    for info in _chosen(source, manifest, names):
        vocab_size = manifest.tokenizer.vocab_size
        found = read_shard(source, info, dtype=manifest.dtype, vocab_size=vocab_size, verify=True, text=text)
        for number, tokens in enumerate(found):
            if manifest.row_tokens is None or tokens.tolist() != [tokenizer.eos_id]:
                yield SampleDocument(source.where(info.name), number, len(tokens), tokenizer.decode(tokens.tolist()))


def _chosen(source: Storage, manifest: Manifest, names: Collection[str] | None) -> list[ShardInfo]:
    if unknown := set(names or ()) - {info.name for info in manifest.shards}:
        raise DataError(f"{source.where(MANIFEST_NAME)}: has no shard {sorted(unknown)[0]}; check the name")
    return [info for info in manifest.shards if names is None or info.name in names]


def survey_shards(
    root: str | Path, head: Manifest, shards: Sequence[ShardInfo | str], workers: int, progress: bool
) -> list[ShardSurvey]:
    """Read shards, given by name or by the entry to compare them with; ``head`` is their manifest without shards."""
    found = []
    with (
        processes(workers) as run,
        tqdm(desc="read", total=len(shards), unit=" shards", disable=not progress) as bar,
    ):
        for shard in run(partial(_survey_shard, root, head), shards):
            found.append(shard)
            bar.update()
    return found


@lru_cache(maxsize=1)
def _opened(root: str | Path, head: Manifest) -> tuple[Storage, TextReader | None]:
    source = open_storage(root)
    return source, open_text(source, head)


def _survey_shard(root: str | Path, head: Manifest, shard: ShardInfo | str) -> ShardSurvey:
    source, text = _opened(root, head)
    name = shard if isinstance(shard, str) else shard.name
    where, found = source.where(name), ShardSurvey()
    try:
        data = source.read(name)
    except UnreadableError as error:
        found.defects.append(str(error))
        return found
    entry = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    try:
        entry |= _read_through(where, data, head, text, found)
        if text is None and isinstance(shard, ShardInfo):
            entry["text_bytes"] = shard.text_bytes  # which tokens do not tell
    except DataError as error:
        found.defects.append(str(error))
    else:
        found.info = ShardInfo(**entry)
    if isinstance(shard, ShardInfo):
        for measured, value in entry.items():
            if value != (wanted := getattr(shard, measured)):
                found.defects.append(f"{where}: its {measured} is {value}, but the manifest says {wanted}")
    return found


def _read_through(
    where: str, data: bytes, head: Manifest, text: TextReader | None, found: ShardSurvey
) -> dict[str, int]:
    """Adds to ``found`` what the samples of a shard hold; returns the counts of its entry."""
    samples = text_bytes = 0
    all_lengths, beyond = [], []
    eos_id, vocab_size = head.tokenizer.eos_id, head.tokenizer.vocab_size
    for key, tokens, lengths, size in _samples(where, data, head, text):
        samples, text_bytes = samples + 1, text_bytes + size
        all_lengths.append(lengths)
        largest = int(tokens.max())
        found.max_token_id = max(found.max_token_id, largest)
        if largest >= vocab_size:
            beyond.append(f"{largest} in sample {key}")
        ended = tokens[np.cumsum(lengths, dtype=np.int64) - 1] == eos_id
        found.unended += int(np.count_nonzero(~ended))
        if head.row_tokens is not None:
            filling = ended & (lengths == 1)
            found.filling += int(np.count_nonzero(filling))
            lengths = lengths[~filling]
        sizes, counts = np.unique(lengths, return_counts=True)
        found.lengths.update(dict(zip(sizes.tolist(), counts.tolist())))
    if not samples:
        raise DataError(f"{where}: it holds no document; leave it out")
    if beyond:
        found.defects.append(
            f"{where}: {len(beyond)} samples have token ids that are not below tokenizer.vocab_size, {vocab_size}: "
            f"such as {beyond[0]}"
        )
    ends = np.cumsum(np.concatenate(all_lengths), dtype=np.int64)
    total = int(ends[-1])
    if head.row_tokens is not None and np.count_nonzero(ends % head.row_tokens == 0) * head.row_tokens != total:
        found.defects.append(f"{where}: a document lies across the end of a row of {head.row_tokens} tokens")
    return {"samples": samples, "documents": len(ends), "tokens": total, "text_bytes": text_bytes}


def _samples(
    where: str, data: bytes, head: Manifest, text: TextReader | None
) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """(key, tokens [n], lengths [documents], bytes of the text where it is known) of each sample."""
    if text is None:
        for key, tokens, lengths in samples_of(where, data, head.dtype):
            yield key, tokens, lengths, 0
    else:
        for key, string, tokens in text.documents(where, data):
            yield key, tokens, np.array([len(tokens)]), len(string.encode())
