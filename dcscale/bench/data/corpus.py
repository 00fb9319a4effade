"""The data that every reader gets: documents of random tokens, decided by a seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

VOCAB_SIZE = 50_000
EOS_ID = VOCAB_SIZE - 1
MEAN_LOG, SPREAD_LOG = np.log(491.0), 1.0
"""Lengths of documents are lognormal, with a median of 491 tokens and a mean of about 810, as of web text."""


@dataclass(frozen=True)
class Corpus:
    """Shards of equal size, which end with a document and with a row: so no format has to leave anything out."""

    tokens_ST: np.ndarray
    """uint16 [S shards, T tokens of one]; every document ends with EOS_ID, which is nowhere else."""

    ends: list[np.ndarray]
    """Of each shard, the end of every document in it."""

    row_tokens: int
    """Divides T."""

    def documents(self, shard: int) -> list[np.ndarray]:
        return np.split(self.tokens_ST[shard], self.ends[shard][:-1])

    def rows(self, shard: int) -> np.ndarray:
        """Tokens of a shard in rows, uint16 [rows, row_tokens]."""
        return self.tokens_ST[shard].reshape(-1, self.row_tokens)

    def histogram(self) -> np.ndarray:
        """How often each token occurs, int64 [VOCAB_SIZE]."""
        return np.bincount(self.tokens_ST.reshape(-1), minlength=VOCAB_SIZE)


def make_corpus(shards: int, shard_tokens: int, row_tokens: int, seed: int = 0) -> Corpus:
    """Random documents; ``shard_tokens`` must be a multiple of ``row_tokens``."""
    if shard_tokens % row_tokens:
        raise ValueError(f"shard_tokens is {shard_tokens}, but must be a multiple of row_tokens, {row_tokens}")
    generator = np.random.default_rng(seed)
    tokens_ST = generator.integers(0, EOS_ID, (shards, shard_tokens), dtype=np.uint16)
    ends = []
    for tokens_T in tokens_ST:
        ends_of_shard = np.array(list(_ends(generator, shard_tokens)))
        tokens_T[ends_of_shard - 1] = EOS_ID
        ends.append(ends_of_shard)
    return Corpus(tokens_ST, ends, row_tokens)


def _ends(generator: np.random.Generator, tokens: int) -> Iterator[int]:
    end = 0
    while end < tokens:
        end = min(tokens, end + 1 + int(generator.lognormal(MEAN_LOG, SPREAD_LOG)))
        yield end
