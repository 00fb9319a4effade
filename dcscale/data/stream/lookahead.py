"""Steps of sequence numbers on their way to sequences: planned in bulk, and announced before they are assembled.

Small steps are assembled in groups, so that the fixed cost of a placement is paid once for several of them. A group
needs no block that its first step does not need: no step waits for a block that only a later one needs, or fails with
it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, islice
from typing import TypeVar

import numpy as np

from dcscale.data.errors import DataError
from dcscale.data.stream.block_reader import BlockPrefetcher
from dcscale.data.stream.order import BlockKey, Placement, Planner
from dcscale.data.stream.sequences import ShuffleBlock

LOOK_AHEAD = 4096
"""Sequences announced ahead in search of blocks to prefetch. At 4096 tokens each, read at 200,000 tokens per second,
they last 80 seconds."""

_CHUNK_SEQUENCES = 512
"""Sequences planned together: enough to make NumPy's fixed costs per call small."""

_GROUP_TOKENS, _GROUP_SEQUENCES = 1 << 17, 128
"""Small steps are assembled together up to this many tokens or sequences: a millisecond of work."""

T = TypeVar("T")
Numbers = Sequence["int | None"]
"""Sequence numbers of a step; None is a row of padding."""


@dataclass
class Group:
    """Steps that are assembled together."""

    sizes: list[int] = field(default_factory=list)
    """Sequences of each step, rows of padding included."""

    placements: list[Placement] = field(default_factory=list)

    def __len__(self) -> int:
        """Sequences of the group, rows of padding included."""
        return sum(self.sizes)


def plan_groups(steps: Iterable[Numbers], planner: Planner, sequence_length: int) -> Iterator[Group]:
    """Plan steps of sequence numbers in groups.

    Raises:
        DataError: a number is negative.
    """
    limit = min(-(-_GROUP_TOKENS // sequence_length), _GROUP_SEQUENCES)
    for chunk in _chunks(steps):
        numbers = [g for step in chunk for g in step]
        is_given_N = np.array([g is not None for g in numbers], dtype=bool)
        numbers_n = np.array([g for g in numbers if g is not None], dtype=np.int64)
        if (numbers_n < 0).any():
            raise DataError(f"sequence number {numbers_n.min()} must not be negative")
        location = planner.locate(numbers_n)
        blocks_2N = np.full((2, len(numbers)), -1)  # padding needs block -1, which no sequence needs
        blocks_2N[:, is_given_N] = planner.blocks(location)
        groups = _group_steps([len(step) for step in chunk], *blocks_2N.tolist(), limit)
        rows = list(map(len, groups))
        group_n = np.repeat(np.arange(len(groups)), rows)[is_given_N]
        row_n = np.concatenate([np.arange(count) for count in rows])[is_given_N]
        for group, placement in planner.placements(location, group_n, row_n):
            groups[group].placements.append(placement)
        yield from groups


def _chunks(steps: Iterable[Numbers]) -> Iterator[list[Numbers]]:
    """Consecutive steps of at least ``_CHUNK_SEQUENCES`` sequences, but for the last ones."""
    chunk, rows = [], 0
    for step in steps:
        chunk.append(step)
        rows += len(step)
        if rows >= _CHUNK_SEQUENCES:
            yield chunk
            chunk, rows = [], 0
    if chunk:
        yield chunk


def _group_steps(sizes: list[int], first: list[int], last: list[int], limit: int) -> list[Group]:
    """Put steps of the given sizes into groups of about ``limit`` sequences.

    Args:
        sizes: sequences of each step.
        first: first block of each sequence.
        last: last block of each sequence.
        limit: a group with this many sequences takes no further step.
    """
    groups: list[Group] = []
    available: set[int] = set()  # blocks that the first step of the current group needs
    for size, end in zip(sizes, accumulate(sizes)):
        needed = {*first[end - size : end], *last[end - size : end]}
        if not groups or len(groups[-1]) >= limit or not needed <= available:
            groups.append(Group())
            available = needed
        groups[-1].sizes.append(size)
    return groups


def assemble_ahead(
    groups: Iterable[Group],
    announce: Callable[[Placement], None],
    wants_more: Callable[[], bool],
    assemble: Callable[[Group], Iterable[T]],
    limit: int = LOOK_AHEAD,
) -> Iterator[T]:
    """Assemble groups one after another, announcing the placements of later groups before.

    Args:
        groups: planned groups.
        announce: called once with each placement, in order, before its group is assembled.
        wants_more: whether further announcements would make something be prefetched.
        assemble: makes the result of each step of a group.
        limit: announce about this many sequences ahead at most.

    Yields:
        The result of each step.
    """
    groups, waiting, announced = iter(groups), deque(), 0

    def announce_groups() -> None:
        nonlocal announced
        while (not waiting or (wants_more() and announced < limit)) and (group := next(groups, None)) is not None:
            for placement in group.placements:
                announce(placement)
            waiting.append(group)
            announced += len(group)

    announce_groups()
    while waiting:
        group = waiting.popleft()
        announced -= len(group)
        results = assemble(group)
        # Before the results are yielded, so that blocks are read while the caller uses them.
        announce_groups()
        yield from results


class BlockSchedule:
    """Decides which blocks of one source are held: the current block of each slot, and the ones to prefetch.

    Placements are taken in the order in which they are announced. Any thread may call it.

    Args:
        prefetcher: reads and holds the blocks.
        slots: V.
        read_ahead: blocks to prefetch; None is one for each slot in use.
    """

    def __init__(self, prefetcher: BlockPrefetcher, slots: int, read_ahead: int | None) -> None:
        self._prefetcher, self._slots, self._read_ahead = prefetcher, slots, read_ahead
        self._lock = threading.Lock()
        self._current: dict[int, BlockKey] = {}  # by slot
        self._announced: deque[Placement] = deque()
        self._wanted: dict[BlockKey, None] = {}  # an ordered set
        self._room = 0

    def restart(self) -> None:
        """Drop all announcements; opens a closed prefetcher again."""
        with self._lock:
            if self._prefetcher.reopen():
                self._current.clear()
            self._announced.clear()
            self._advance()

    def announce(self, placement: Placement) -> None:
        """Say that a placement will be taken after those announced before."""
        with self._lock:
            self._announced.append(placement)
            # Without room, it is considered when a slot moves to another block: see _advance.
            if self._room > 0 and placement.block not in self._wanted:
                self._want([*self._wanted, placement.block])

    @property
    def wants_more(self) -> bool:
        """Whether further announcements would make blocks be prefetched."""
        return self._room > 0

    def take(self, placement: Placement) -> ShuffleBlock:
        """The block of a placement; waits for it.

        Raises:
            DataError: one of its shards cannot be used, or the schedule was closed.
        """
        with self._lock:
            if self._announced and self._announced[0] is placement:
                self._announced.popleft()
            if self._current.get(placement.slot) != placement.block:
                self._current[placement.slot] = placement.block
                self._advance()
            return self._prefetcher.get(placement.block)

    def close(self) -> None:
        """Release all blocks and fail threads that wait for one, until :meth:`restart`."""
        self._prefetcher.close()

    def _advance(self) -> None:
        """Evict blocks that no slot is in any more, and prefetch those that are needed next."""
        wanted = dict.fromkeys(self._current.values())
        limit = len(wanted) + self._ahead_limit()
        for placement in self._announced:
            if len(wanted) >= limit:
                break
            wanted[placement.block] = None
        self._want(list(wanted)[:limit])

    def _ahead_limit(self) -> int:
        """Blocks to prefetch."""
        if self._read_ahead is not None:
            return self._read_ahead
        return len(self._current.keys() | {placement.slot for placement in islice(self._announced, self._slots)})

    def _want(self, blocks: list[BlockKey]) -> None:
        self._wanted = dict.fromkeys(blocks)
        self._room = self._ahead_limit() - len(self._wanted.keys() - self._current.values())
        self._prefetcher.want(blocks)
