"""The order of sequences: a pure function of a sequence's number and the token counts in the manifest.

A run numbers its sequences g = 0, 1, 2, ...; optimizer step t takes [t*B, (t+1)*B). Where sequence g is depends on the
data, the sequence length L, the number of slots V, the shards per block K and the seed; not on ranks, workers, batch
size or prefetching.

1. An epoch permutes the shards. Each K consecutive shards form a shuffle block: the unit of shuffling and of reading.
2. The documents of each block are permuted. All blocks, one after another, are the T tokens of the epoch. Sequence s is
   the L + 1 tokens from s*L on: its L inputs and L targets. An epoch has N = ceil((T - 1) / L) sequences, whatever its
   permutation; only the very last is padded, and every token but the first is a target exactly once.
   Shards of packed rows (see :mod:`dcscale.data.prepare.packing`) are cut at the rows instead, and a block permutes its
   rows: sequence s is the L + 1 tokens from s*(L + 1) on, and N = T / (L + 1).
3. The N sequences are cut into V contiguous runs, whose lengths differ by at most one. Number g is sequence
   (g mod N) div V of run (g mod N) mod V. Slot v reads the numbers with g mod V = v, so in each epoch it reads one run
   forward. Runs begin in the middle of blocks, so neighbours in a batch come from all over the epoch, and slots move
   to their next blocks at different times.

:class:`Order` does 1 and 2 for one source; a :class:`Planner` does 3, for one source or several.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

import numpy as np

ORDER_VERSION = 1


def permutation(count: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of ``range(count)``, int64 [count], determined by ``purpose`` and ``numbers``.

    Sorts the raw 64-bit words of Philox-4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
    NumPy guarantees that those words never change; it does not guarantee this for its own ``permutation`` (NEP 19).
    """
    key = hashlib.blake2b(repr((purpose, *map(int, numbers))).encode(), digest_size=16).digest()
    words = np.random.Philox(key=np.frombuffer(key, "<u8")).random_raw(count)
    return np.argsort(words, kind="stable")


class BlockKey(NamedTuple):
    """Identifies a shuffle block of a source."""

    epoch: int
    index: int
    """Position of the block in the epoch, from 0."""


class Location(NamedTuple):
    """Which sequences of which sources N numbers are; int64 [N] each."""

    source_N: np.ndarray
    epoch_N: np.ndarray
    """Epoch of the source."""

    index_N: np.ndarray
    """Index of the sequence in that epoch."""

    slot_N: np.ndarray
    """Slot that reads the sequence."""

    def select(self, of_n: np.ndarray) -> Location:
        """The same of some of the numbers, by index."""
        return Location(*(x_N[of_n] for x_N in self))


class Placement(NamedTuple):
    """Tokens of one block, and the rows of a group of sequences that they fill.

    Row ``rows_n[i]`` takes tokens [start + i * stride, stop + i * stride) of the block, from ``column`` on, where
    ``stride`` is :attr:`Order.stride`.
    """

    source: int
    slot: int
    block: BlockKey
    rows_n: np.ndarray
    column: int
    """Above 0 where the first of the sequences begins in an earlier block."""

    start: int
    stop: int


class Order:
    """The order of one source: shards in blocks, documents in blocks, sequences in epochs.

    Args:
        shard_tokens: tokens of each shard, from the manifest; their sum must exceed ``sequence_length``.
        sequence_length: L, targets per sequence.
        shuffle_shards: K, shards per block.
        seed: seed of all permutations.
        shuffle: false keeps shards and documents in the manifest's order, in every epoch.
        source_number: number of the source among several that share a seed.
        rows: the shards consist of packed rows of ``sequence_length + 1`` tokens.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int],
        *,
        sequence_length: int,
        shuffle_shards: int,
        seed: int,
        shuffle: bool = True,
        source_number: int = 0,
        rows: bool = False,
    ) -> None:
        self.sequence_length = sequence_length
        self.shuffle_shards = shuffle_shards
        self.shuffle = shuffle
        self._rng_key = (int(seed), int(source_number))
        self._shard_tokens = np.array(shard_tokens, dtype=np.int64)
        self.tokens = int(self._shard_tokens.sum())
        self.stride = sequence_length + rows
        """Tokens from the start of one sequence to the start of the next."""
        self.sequences_per_epoch = self.tokens // self.stride if rows else -(-(self.tokens - 1) // self.stride)
        # Two: at the end of an epoch, slots enter the next one while others still read this one.
        self._epoch = lru_cache(maxsize=2)(self._plan_epoch)

    def shards(self, block: BlockKey) -> list[int]:
        """Numbers of the shards of a block, in order; empty past the last block of the epoch."""
        epoch, index = block
        shards, _ = self._epoch(epoch)
        return shards[index * self.shuffle_shards : (index + 1) * self.shuffle_shards].tolist()

    def document_order(self, block: BlockKey, count: int) -> np.ndarray:
        """Order of a block's ``count`` documents or rows, numbered through its shards; int64 [count]."""
        if not self.shuffle:
            return np.arange(count)
        return permutation(count, "documents", *self._rng_key, *block)

    def blocks(self, epoch_N: np.ndarray, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and last block of sequences, int64 [N] each, numbered through all epochs."""
        first_N, last_N = np.empty_like(index_N), np.empty_like(index_N)
        begin_N, end_N = self._token_range(index_N)
        for epoch in np.unique(epoch_N).tolist():
            _, block_starts = self._epoch(epoch)
            of_n = epoch_N == epoch
            blocks = _blocks_of(block_starts, begin_N[of_n], end_N[of_n])
            first_N[of_n], last_N[of_n] = (epoch * len(block_starts) + block_n for block_n in blocks)
        return first_N, last_N

    def placements(self, location: Location, group_N: np.ndarray, row_N: np.ndarray) -> list[tuple[int, Placement]]:
        """Placements of N sequences of this source, in order of (group, slot, row).

        Consecutive sequences of a slot that are in one group and one block share a placement.

        Args:
            location: where the sequences are.
            group_N: group of each sequence, int64 [N].
            row_N: row of each sequence in its group, int64 [N].

        Returns:
            (group, placement) of each placement.
        """
        by_slot_N = np.lexsort((row_N, location.slot_N, group_N))
        source_N, epoch_N, index_N, slot_N = location.select(by_slot_N)
        group_N, row_N = group_N[by_slot_N], row_N[by_slot_N]
        begin_N, end_N = self._token_range(index_N)
        found = []
        for epoch in np.unique(epoch_N).tolist():
            _, block_starts = self._epoch(epoch)
            of_n = np.flatnonzero(epoch_N == epoch)
            first_n, last_n = _blocks_of(block_starts, begin_N[of_n], end_N[of_n])
            count_n = last_n - first_n + 1
            # Split sequences at block boundaries into P parts: part p belongs to sequence of_P[p] and block block_P[p].
            of_P = np.repeat(of_n, count_n)
            block_P = np.arange(len(of_P)) + np.repeat(first_n - np.cumsum(count_n) + count_n, count_n)
            block_start_P = block_starts[block_P]
            start_P = np.maximum(begin_N[of_P] - block_start_P, 0)
            stop_P = np.minimum(end_N[of_P], block_starts[block_P + 1]) - block_start_P
            column_P = start_P + block_start_P - begin_N[of_P]
            # A part continues a placement if everything advances as from one sequence to the next.
            steps = (
                (of_P, 1),
                (group_N[of_P], 0),
                (slot_N[of_P], 0),
                (block_P, 0),
                (start_P, self.stride),
                (stop_P, self.stride),
            )
            continues = np.logical_and.reduce([np.diff(x_P) == step for x_P, step in steps])
            heads = np.flatnonzero(np.concatenate([[True], ~continues]))
            # Part heads[i] begins a placement of the sequences [first[i], end[i]).
            first = of_P[heads]
            end = first + np.diff(heads, append=len(of_P))
            fields = (first, end, group_N[first], source_N[first], slot_N[first])
            fields += (block_P[heads], column_P[heads], start_P[heads], stop_P[heads])
            for n, stop_n, group, source, slot, block, column, start, stop in zip(*(x.tolist() for x in fields)):
                placement = Placement(source, slot, BlockKey(epoch, block), row_N[n:stop_n], column, start, stop)
                found.append((n, group, placement))
        # Epochs were planned one by one. The sort is stable: parts of a sequence stay in the order of their blocks.
        found.sort(key=itemgetter(0))
        return [(group, placement) for _, group, placement in found]

    def _token_range(self, index_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token of sequences in the epoch, and the end of their tokens."""
        begin_N = index_N * self.stride
        return begin_N, np.minimum(begin_N + self.sequence_length + 1, self.tokens)

    def _plan_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(order of the shards [S], first token of each block and the end of the epoch [blocks + 1])."""
        count = len(self._shard_tokens)
        shards = permutation(count, "shards", *self._rng_key, epoch) if self.shuffle else np.arange(count)
        ends = np.cumsum(self._shard_tokens[shards])
        return shards, np.concatenate([[0], ends[self.shuffle_shards - 1 : -1 : self.shuffle_shards], [self.tokens]])


def _blocks_of(block_starts: np.ndarray, begin_N: np.ndarray, end_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last block of the tokens [begin, end), by the first token of each block."""
    return np.searchsorted(block_starts, begin_N, side="right") - 1, np.searchsorted(block_starts, end_N) - 1


class Planner(ABC):
    """Maps sequence numbers to placements; a pure function.

    Args:
        orders: order of each source.
        slots: V, independent read positions.
    """

    def __init__(self, orders: Sequence[Order], slots: int) -> None:
        self.orders, self.slots = list(orders), slots

    @abstractmethod
    def locate(self, numbers_N: np.ndarray) -> Location:
        """Source, epoch, index and slot of sequence numbers, int64 [N]."""

    @abstractmethod
    def count(self, source: int, stop: np.ndarray | int) -> np.ndarray | int:
        """How many of the numbers below ``stop`` belong to a source, in the shape of ``stop``."""

    def blocks(self, location: Location) -> tuple[np.ndarray, np.ndarray]:
        """First and last block of each sequence, int64 [N] each, numbered through all sources and epochs."""
        first_N, last_N = np.empty_like(location.index_N), np.empty_like(location.index_N)
        for source, of_n in self._by_source(location):
            blocks = self.orders[source].blocks(location.epoch_N[of_n], location.index_N[of_n])
            first_N[of_n], last_N[of_n] = (block_n * len(self.orders) + source for block_n in blocks)
        return first_N, last_N

    def placements(self, location: Location, group_N: np.ndarray, row_N: np.ndarray) -> Iterator[tuple[int, Placement]]:
        """Placements of N sequences, source by source; see :meth:`Order.placements`."""
        for source, of_n in self._by_source(location):
            yield from self.orders[source].placements(location.select(of_n), group_N[of_n], row_N[of_n])

    def placements_of(self, number: int) -> list[Placement]:
        """Placements of a single sequence."""
        location, zero_N = self.locate(np.array([number])), np.zeros(1, dtype=np.int64)
        return [placement for _, placement in self.placements(location, zero_N, zero_N)]

    def _by_source(self, location: Location) -> Iterator[tuple[int, np.ndarray]]:
        """Each source that occurs, and which sequences are its own."""
        for source in np.unique(location.source_N).tolist():
            yield source, np.flatnonzero(location.source_N == source)


class SinglePlanner(Planner):
    """Planner of a single source.

    Args:
        order: order of the source.
        slots: V.
    """

    def __init__(self, order: Order, slots: int) -> None:
        super().__init__([order], slots)

    def locate(self, numbers_N: np.ndarray) -> Location:
        """See :meth:`Planner.locate`."""
        sequences = self.orders[0].sequences_per_epoch
        epoch_N, position_N = np.divmod(numbers_N, sequences)
        in_run_N, run_N = np.divmod(position_N, self.slots)
        # The first ``longer`` runs have one sequence more than the others.
        length, longer = divmod(sequences, self.slots)
        index_N = run_N * length + np.minimum(run_N, longer) + in_run_N
        return Location(np.zeros_like(numbers_N), epoch_N, index_N, numbers_N % self.slots)

    def count(self, source: int, stop: np.ndarray | int) -> np.ndarray | int:
        """See :meth:`Planner.count`."""
        return stop
