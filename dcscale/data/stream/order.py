"""The order of sequences: a pure function of a sequence's global number, from the manifest's token counts alone.

A run numbers its sequences g = 0, 1, 2, ...; optimizer step t takes [t*B, (t+1)*B). Where g lies depends on the data
and on sequence length L, slots V, shards a window K and the seed; not on ranks, workers, batch size or prefetching.

1. An epoch permutes the shards; each K consecutive ones form a window: the unit of shuffling and of reading.
2. Each window's documents are permuted. All windows, one after another, are the epoch's T tokens. Sequence s is the
   L + 1 tokens from s*L on: its L inputs and L targets. An epoch has N = ceil((T - 1) / L) sequences, whatever its
   permutation; only the very last is padded, and every token but the first is a target exactly once.
   Shards made of rows (see :mod:`dcscale.data.prepare.packing`) are cut at the rows instead, and it is rows that a
   window permutes: sequence s is the tokens from s*(L + 1) on, and N = T / (L + 1).
3. The N sequences are cut into V contiguous runs, one a slot, whose lengths differ by at most one. Position g is row
   (g mod N) div V of slot (g mod N) mod V. Each slot reads forward, and slots begin in the middle of windows, so
   neighbours in a batch come from all over the epoch and window changes are spread over time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
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


class Stretch(NamedTuple):
    """Sequences that follow each other in a window, or a part of one."""

    first: int
    """Which of those asked for is the first."""

    count: int
    epoch: int
    window: int

    column: int
    """Tokens of the first that lie before: above 0 where it has begun in another window."""

    start: int
    stop: int
    """Tokens [start, stop) of the window are those of the first; the others' lie ``stride`` further each."""


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
        self.stride = sequence_length + rows
        """Tokens from one sequence to the next."""
        self.sequences_per_epoch = self.tokens // self.stride if rows else -(-(self.tokens - 1) // self.stride)
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def locate(self, g: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
        """(epoch, index of the sequence in it) of global sequence numbers ``g``, in their shape."""
        epoch, position = np.divmod(g, self.sequences_per_epoch)
        row, slot = np.divmod(position, self.slots)
        length, longer = divmod(self.sequences_per_epoch, self.slots)
        return epoch, slot * length + np.minimum(slot, longer) + row

    def pieces(self, epoch: int, index: int) -> list[Piece]:
        """The L + 1 tokens of a sequence (fewer for an epoch's last), in order, as parts of windows."""
        found = self.stretches(np.array([epoch]), np.array([index]), np.zeros(1))
        return [Piece(stretch.window, stretch.start, stretch.stop) for stretch in found]

    def stretches(self, epoch_N: np.ndarray, index_N: np.ndarray, group_N: np.ndarray) -> list[Stretch]:
        """The tokens of N sequences, in order, as parts of windows.

        Sequences of one group that follow each other there and in a window are taken together.
        """
        found = []
        begin_N, end_N = self._ends(index_N)
        for epoch in np.unique(epoch_N).tolist():
            _, starts = self._epoch(epoch)
            of_n = np.flatnonzero(epoch_N == epoch)
            window_n, last_n = _windows(starts, begin_N[of_n], end_N[of_n])
            parts_n = last_n - window_n + 1
            # A part is that of a sequence which lies in one window.
            of_P = np.repeat(of_n, parts_n)
            window_P = np.arange(len(of_P)) + np.repeat(window_n - np.cumsum(parts_n) + parts_n, parts_n)
            first_P = starts[window_P]
            start_P = np.maximum(begin_N[of_P] - first_P, 0)
            stop_P = np.minimum(end_N[of_P], starts[window_P + 1]) - first_P
            column_P = start_P + first_P - begin_N[of_P]
            steps = ((of_P, 1), (group_N[of_P], 0), (window_P, 0), (start_P, self.stride), (stop_P, self.stride))
            goes_on = np.logical_and.reduce([np.diff(x_P) == step for x_P, step in steps])
            heads = np.flatnonzero(np.concatenate([[True], ~goes_on]))
            counts = np.diff(heads, append=len(of_P))
            columns = [x[heads].tolist() for x in (of_P, window_P, column_P, start_P, stop_P)]
            found += map(Stretch, columns[0], counts.tolist(), repeat(epoch), *columns[1:])
        return sorted(found)

    def windows(self, epoch_N: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The first and the last window of sequences, int64 [N] each, numbered through all epochs."""
        first_N, last_N = np.empty_like(index_N), np.empty_like(index_N)
        begin_N, end_N = self._ends(index_N)
        for epoch in np.unique(epoch_N).tolist():
            _, starts = self._epoch(epoch)
            of_n = epoch_N == epoch
            windows = _windows(starts, begin_N[of_n], end_N[of_n])
            first_N[of_n], last_N[of_n] = (epoch * len(starts) + window_n for window_n in windows)
        return first_N, last_N

    def shards(self, epoch: int, window: int) -> list[int]:
        """Numbers of the shards of a window, in order."""
        shards, _ = self._epoch(epoch)
        return shards[window * self.shuffle_shards : (window + 1) * self.shuffle_shards].tolist()

    def documents(self, epoch: int, window: int, count: int) -> np.ndarray:
        """Order of the ``count`` documents or rows of a window, int64 [count]; they are numbered through its shards."""
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, "documents", *self._rng_key, epoch, window)

    def _ends(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token of sequences in the epoch, and the end of their tokens."""
        begin_N = index_N * self.stride
        return begin_N, np.minimum(begin_N + self.sequence_length + 1, self.tokens)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the shards [S], first token of each window and the epoch's end [windows + 1])."""
        count = len(self._shard_tokens)
        shards = permutation(count, "shards", *self._rng_key, epoch) if self.shuffle else np.arange(count)
        ends = np.cumsum(self._shard_tokens[shards])
        return shards, np.concatenate([[0], ends[self.shuffle_shards - 1 : -1 : self.shuffle_shards], [self.tokens]])


def _windows(starts: np.ndarray, begin_N: np.ndarray, end_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first and the last window that tokens [begin, end) lie in, by the windows' first tokens."""
    return np.searchsorted(starts, begin_N, side="right") - 1, np.searchsorted(starts, end_N) - 1
