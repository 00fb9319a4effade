"""Steps of sequences on their way from numbers to batches: where many lie is found at once, and told ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

import numpy as np

from dcscale.data.errors import DataError

LOOK_AHEAD = 4096
"""Sequences that are looked at for windows to read ahead: of 4096 tokens each, read 200,000 a second, those of 80 s."""

_PLACED = 256
"""Sequences that are placed together: enough for NumPy to cost little for each."""

T, U = TypeVar("T"), TypeVar("U")


class Step(Generic[T]):
    """What a step consists of; its length is the sequences in it, rows of padding included."""

    def __init__(self, rows: int) -> None:
        self._rows, self._places = rows, []

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[T]:
        return iter(self._places)

    def append(self, place: T) -> None:
        self._places.append(place)


def placed(
    steps: Iterable[Sequence[int | None]],
    places: Callable[[np.ndarray, np.ndarray, np.ndarray], Iterable[tuple[int, T]]],
) -> Iterator[Step[T]]:
    """Each step of numbers as what ``places`` makes of them. None is a row without a place.

    ``places`` takes numbers, and the step and row of each, int64 [N]; it gives places with the steps that they belong
    to. Steps are counted anew in each call.

    Raises:
        DataError: a number is negative.
    """
    for block in _blocks(steps):
        made: list[Step[T]] = [Step(len(step)) for step in block]
        rows = list(map(len, block))
        step_N = np.repeat(np.arange(len(block)), rows)
        row_N = np.concatenate([np.arange(count) for count in rows])
        numbers = [g for step in block for g in step]
        if None in numbers:
            given = [i for i, g in enumerate(numbers) if g is not None]
            numbers, step_N, row_N = [numbers[i] for i in given], step_N[given], row_N[given]
        if numbers:
            if min(numbers) < 0:
                raise DataError(f"sequence number {min(numbers)} must not be negative")
            for n, place in places(np.array(numbers), step_N, row_N):
                made[n].append(place)
        yield from made


def _blocks(steps: Iterable[Sequence[int | None]]) -> Iterator[list[Sequence[int | None]]]:
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
    steps: Iterable[list[T]],
    expect: Callable[[T], None],
    hungry: Callable[[], bool],
    make: Callable[[list[T]], U],
    most: int = LOOK_AHEAD,
) -> Iterator[U]:
    """What ``make`` makes of each step. Before it, ``expect`` is told the step's items, one by one, and those of the
    next steps: up to about ``most``, as long as ``hungry`` says that there is use for more."""
    steps, told, waiting = iter(steps), 0, deque()

    def tell() -> None:
        nonlocal told
        while (not waiting or (hungry() and told < most)) and (step := next(steps, None)) is not None:
            for item in step:
                expect(item)
            waiting.append(step)
            told += len(step)

    tell()
    while waiting:
        step = waiting.popleft()
        told -= len(step)
        made = make(step)
        tell()
        yield made
