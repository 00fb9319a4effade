"""The order of sequences: a pure function of a sequence's global number, from the manifest's token counts alone.

A run numbers its sequences g = 0, 1, 2, ...; optimizer step t takes [t*B, (t+1)*B). Where g lies depends on the data
and on sequence length L, slots V, shards a window K and the seed; not on ranks, workers, batch size or prefetching.

1. An epoch permutes the shards; each K consecutive ones form a window: the unit of shuffling and of reading.
2. Each window's documents are permuted. All windows, one after another, are the epoch's T tokens. Sequence s is the
   L + 1 tokens from s*L on: its L inputs and L targets. An epoch has N = ceil((T - 1) / L) sequences, whatever its
   permutation; only the very last is padded, and every token but the first is a target exactly once.
   Shards made of rows (see :mod:`packing <dcscale.data.packing>`) are cut at the rows instead, and it is rows that a
   window permutes: sequence s is the tokens from s*(L + 1) on, and N = T / (L + 1).
3. The N sequences are cut into V contiguous runs, one a slot, whose lengths differ by at most one. Position g is row
   (g mod N) div V of slot (g mod N) mod V. Each slot reads forward, and slots begin in the middle of windows, so
   neighbours in a batch come from all over the epoch and window changes are spread over time.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ORDER_VERSION = 1


def permutation(count: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64 [count], decided by ``purpose`` and ``numbers``.

    Sorts the raw 64-bit words of Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    NumPy fixes those words for good, which it does not for its own ``permutation`` (NEP 19).
    """
    key = hashlib.blake2b(repr((purpose, *map(int, numbers))).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(count)
    return np.argsort(words, kind="stable")


class Piece(NamedTuple):
    """Part of a sequence: tokens [start, stop) of a window."""

    window: int
    start: int
    stop: int


class Order:
    """Where every sequence of one source lies.

    Args:
        shard_tokens: tokens of each shard, from the manifest; their sum must exceed ``sequence_length``.
        sequence_length: L, targets a sequence.
        slots: V, independent read positions.
        shuffle_shards: K, shards a window.
        seed: seed of all permutations.
        shuffle: false keeps shards and documents in the manifest's order, in every epoch.
        source: number of the source among several that share a seed.
        rows: the shards are made of rows of ``sequence_length + 1`` tokens.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int],
        *,
        sequence_length: int,
        slots: int,
        shuffle_shards: int,
        seed: int,
        shuffle: bool = True,
        source: int = 0,
        rows: bool = False,
    ) -> None:
        self.sequence_length = sequence_length
        self.slots = slots
        self.shuffle_shards = shuffle_shards
        self.shuffle = shuffle
        self._rng_key = (int(seed), int(source))
        self._shard_tokens = np.array(shard_tokens, dtype=np.int64)
        self.tokens = int(self._shard_tokens.sum())
        self._stride = sequence_length + rows
        self.sequences_per_epoch = self.tokens // self._stride if rows else -(-(self.tokens - 1) // self._stride)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def locate(self, g: int) -> tuple[int, int]:
        """(epoch, index of the sequence in it) of global sequence number ``g``."""
        epoch, position = divmod(g, self.sequences_per_epoch)
        row, slot = divmod(position, self.slots)
        length, longer = divmod(self.sequences_per_epoch, self.slots)
        return epoch, slot * length + min(slot, longer) + row

    def pieces(self, epoch: int, index: int) -> list[Piece]:
        """The L + 1 tokens of a sequence (fewer for an epoch's last), in order, as parts of windows."""
        _, starts = self._epoch(epoch)
        begin = index * self._stride
        end = min(begin + self.sequence_length + 1, self.tokens)
        window = bisect_right(starts, begin) - 1
        pieces = []
        while begin < end:
            first, stop = starts[window], min(end, starts[window + 1])
            pieces.append(Piece(window, begin - first, stop - first))
            window, begin = window + 1, stop
        return pieces

    def shards(self, epoch: int, window: int) -> list[int]:
        """Numbers of the shards of a window, in order."""
        shards, _ = self._epoch(epoch)
        return shards[window * self.shuffle_shards : (window + 1) * self.shuffle_shards].tolist()

    def documents(self, epoch: int, window: int, count: int) -> np.ndarray:
        """Order of the ``count`` documents or rows of a window, int64 [count]; they are numbered through its shards."""
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, "documents", *self._rng_key, epoch, window)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, memoryview]:
        """(order of the shards [S], first token of each window and the epoch's end [windows + 1], as Python's ints)."""
        count = len(self._shard_tokens)
        shards = permutation(count, "shards", *self._rng_key, epoch) if self.shuffle else np.arange(count)
        ends = np.cumsum(self._shard_tokens[shards])
        starts = np.concatenate([[0], ends[self.shuffle_shards - 1 : -1 : self.shuffle_shards], [self.tokens]])
        return shards, memoryview(starts)
