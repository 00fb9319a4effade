"""Steps of sequences on their way from numbers to batches: where many lie is found at once, and told ahead.

Small steps are made in groups: what a part of a window costs apart from its tokens is then paid once for all of them.
A group needs no window that its first step does not need. So no step waits for what only a later one needs, or fails
with it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Generic, TypeVar

import numpy as np

from dcscale.data.errors import DataError

LOOK_AHEAD = 4096
"""Sequences that are looked at for windows to read ahead: of 4096 tokens each, read 200,000 a second, those of 80 s."""

_PLACED = 512
"""Sequences that are placed together: enough for NumPy to cost little for each."""

_GROUP_TOKENS, _GROUP_SEQUENCES = 1 << 17, 128
"""So many tokens or sequences are made together, where a step has fewer: a millisecond of work."""

T, U = TypeVar("T"), TypeVar("U")
Numbers = Sequence["int | None"]
"""Global numbers of a step's sequences; None is a row of padding."""


class Group(Generic[T]):
    """What steps consist of that are made together; its length is the sequences in them, rows of padding included."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        """Sequences of each step."""
        self._places: list[T] = []

    def __len__(self) -> int:
        return sum(self.sizes)

    def __iter__(self) -> Iterator[T]:
        return iter(self._places)

    def append(self, place: T) -> None:
        self._places.append(place)


def placed(
    steps: Iterable[Numbers],
    windows: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    places: Callable[[np.ndarray, np.ndarray, np.ndarray], Iterable[tuple[int, T]]],
    length: int,
) -> Iterator[Group[T]]:
    """Steps of numbers, of sequences of ``length`` tokens, as what ``places`` makes of them, in groups.

    ``windows`` takes numbers, int64 [N], and gives the first and the last window of each, int64 [N]. ``places`` takes
    numbers, and the group and row in it of each, int64 [N]; it gives places with the groups that they belong to. Groups
    are counted anew in each call.

    Raises:
        DataError: a number is negative.
    """
    most = min(-(-_GROUP_TOKENS // length), _GROUP_SEQUENCES)
    for block in _blocks(steps):
        numbers = [g for step in block for g in step]
        is_given_N = np.array([g is not None for g in numbers], dtype=bool)
        numbers_n = np.array([g for g in numbers if g is not None], dtype=np.int64)
        if (numbers_n < 0).any():
            raise DataError(f"sequence number {numbers_n.min()} must not be negative")
        windows_2N = np.full((2, len(numbers)), -1)
        windows_2N[:, is_given_N] = windows(numbers_n)
        first, last = windows_2N.tolist()
        groups: list[Group[T]] = []
        needed: set[int] = set()
        for step, end in zip(block, accumulate(map(len, block))):
            needs = {*first[end - len(step) : end], *last[end - len(step) : end]}
            if not groups or len(groups[-1]) >= most or not needs <= needed:
                groups.append(Group())
                needed = needs
            groups[-1].sizes.append(len(step))
        rows = list(map(len, groups))
        group_n = np.repeat(np.arange(len(groups)), rows)[is_given_N]
        row_n = np.concatenate([np.arange(count) for count in rows])[is_given_N]
        if len(numbers_n):
            for number, place in places(numbers_n, group_n, row_n):
                groups[number].append(place)
        yield from groups


def _blocks(steps: Iterable[Numbers]) -> Iterator[list[Numbers]]:
    block, rows = [], 0
    for step in steps:
        block.append(step)
        rows += len(step)
        if rows >= _PLACED:
            yield block
            block, rows = [], 0
    if block:
        yield block


def made_ahead(
    groups: Iterable[Group[T]],
    expect: Callable[[T], None],
    hungry: Callable[[], bool],
    make: Callable[[Group[T]], Iterable[U]],
    most: int = LOOK_AHEAD,
) -> Iterator[U]:
    """What ``make`` makes of each group, a piece for each step. Before it, ``expect`` is told the group's places, one
    by one, and those of the next groups: up to about ``most`` sequences, as long as ``hungry`` says that there is use
    for more."""
    groups, told, waiting = iter(groups), 0, deque()

    def tell() -> None:
        nonlocal told
        while (not waiting or (hungry() and told < most)) and (group := next(groups, None)) is not None:
            for place in group:
                expect(place)
            waiting.append(group)
            told += len(group)

    tell()
    while waiting:
        group = waiting.popleft()
        told -= len(group)
        made = make(group)
        tell()
        yield from made
