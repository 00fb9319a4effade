"""The data that every reader gets: random documents, determined by a seed, and how to write them as token shards.

Axes in names: S shards, T tokens of a shard.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import webdataset

from dcscale.data.shards.manifest import Manifest, ShardInfo, TokenizerInfo, write_manifest
from dcscale.data.shards.shard import write_shard
from dcscale.data.tokenizers import ByteTokenizer

VOCAB_SIZE = 50_000
EOS_ID = VOCAB_SIZE - 1
MEAN_LOG, SPREAD_LOG = np.log(491.0), 1.0
"""Document lengths are lognormal as in web text, with a median of 491 tokens and a mean of about 810."""


@dataclass(frozen=True)
class Corpus:
    """Shards of equal size. Each ends with the end of a document and of a row, so that no format has to drop tokens."""

    tokens_ST: np.ndarray
    """uint16 [S, T]; every document ends with EOS_ID, which occurs only there."""

    ends: list[np.ndarray]
    """For each shard, the end positions of its documents."""

    row_tokens: int
    """Tokens of a row; divides T."""

    def documents(self, shard: int) -> list[np.ndarray]:
        """The documents of a shard."""
        return np.split(self.tokens_ST[shard], self.ends[shard][:-1])

    def rows(self, shard: int) -> np.ndarray:
        """The rows of a shard, uint16 [rows, row_tokens]."""
        return self.tokens_ST[shard].reshape(-1, self.row_tokens)

    def histogram(self) -> np.ndarray:
        """How often each token occurs, int64 [VOCAB_SIZE]."""
        return np.bincount(self.tokens_ST.reshape(-1), minlength=VOCAB_SIZE)


def make_corpus(shards: int, shard_tokens: int, row_tokens: int, seed: int = 0) -> Corpus:
    """Random documents.

    Raises:
        ValueError: ``shard_tokens`` is not a multiple of ``row_tokens``.
    """
    if shard_tokens % row_tokens:
        raise ValueError(f"shard_tokens is {shard_tokens}, but must be a multiple of row_tokens, {row_tokens}")
    generator = np.random.default_rng(seed)
    tokens_ST = generator.integers(0, EOS_ID, (shards, shard_tokens), dtype=np.uint16)
    ends = []
    for tokens_T in tokens_ST:
        # The last document is cut at the end of the shard.
        ends_of_shard = np.array(list(_ends(generator, shard_tokens)))
        tokens_T[ends_of_shard - 1] = EOS_ID
        ends.append(ends_of_shard)
    return Corpus(tokens_ST, ends, row_tokens)


def _ends(generator: np.random.Generator, tokens: int) -> Iterator[int]:
    end = 0
    while end < tokens:
        end = min(tokens, end + 1 + int(generator.lognormal(MEAN_LOG, SPREAD_LOG)))
        yield end


BUNDLE_TOKENS = 1 << 16
"""Tokens of a bundle, as tools/make_shards.py writes them."""

_TOKENIZER = TokenizerInfo("byte", ByteTokenizer.fingerprint, VOCAB_SIZE, EOS_ID)


def write_bundles(corpus: Corpus, folder: Path) -> None:
    """Write the corpus in dcscale's format: samples of many documents."""
    infos = []
    for shard in range(len(corpus.ends)):
        bundles, held = [[]], 0
        for document in corpus.documents(shard):
            if held >= BUNDLE_TOKENS:
                bundles.append([])
                held = 0
            bundles[-1].append(document)
            held += len(document)
        # Sample keys sort in the order of the corpus.
        keyed = [(f"{shard:05d}-{number:05d}", bundle) for number, bundle in enumerate(bundles)]
        infos.append(write_shard(folder, f"shard-{shard:05d}.tar", keyed, dtype="uint16", text_bytes=0))
    _write_manifest(folder, infos)


def write_documents(corpus: Corpus, folder: Path) -> None:
    """Write one sample per document, as is common with WebDataset, and dcscale's manifest."""
    infos = []
    for shard in range(len(corpus.ends)):
        documents, buffer = corpus.documents(shard), io.BytesIO()
        with webdataset.TarWriter(buffer, mtime=0) as writer:
            for number, document in enumerate(documents):
                writer.write({"__key__": f"{shard:05d}-{number:06d}", "tokens.npy": document})
        data, name = buffer.getvalue(), f"shard-{shard:05d}.tar"
        (folder / name).write_bytes(data)
        counts = (len(documents), len(documents), len(corpus.tokens_ST[shard]), 0)
        infos.append(ShardInfo(name, len(data), hashlib.sha256(data).hexdigest(), *counts))
    _write_manifest(folder, infos)


def _write_manifest(folder: Path, infos: list[ShardInfo]) -> None:
    write_manifest(folder, Manifest("uint16", _TOKENIZER, EOS_ID, tuple(infos)))
