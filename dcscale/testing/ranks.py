"""Ranks that are threads of one process, with a tiny state of their own, for what saves and reads checkpoints."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from dcscale.parallel import KINDS, Environment, Snapshot

T = TypeVar("T")

SHAPES = {"embedding.weight": (6, 4), "norm.weight": (5,)}


def tiny_snapshot(rank: int, ranks: int, step: int) -> Snapshot:
    """One rank's part of a state of which every master is ``step`` + 0.001 times its index, moments 10 and 20 more."""
    tensors = {}
    for name, shape in SHAPES.items():
        size = torch.Size(shape).numel()
        start, stop = (size * r // ranks for r in (rank, rank + 1))
        for number, kind in enumerate(KINDS):
            tensors[name, kind, start] = step + 10 * number + torch.arange(start, stop) / 1000
    return Snapshot(rank, ranks, step, SHAPES, tensors)


class ThreadEngine:
    """What :class:`dcscale.checkpoint.Checkpoints` needs of an engine. ``step`` is that of the state it has."""

    dtype = torch.bfloat16

    def __init__(self, rank: int, ranks: int, said: list[Any], barrier: threading.Barrier):
        self.environment = Environment(rank, rank, ranks, ranks, torch.device("cpu"))
        self.step = 0
        self._said, self._barrier = said, barrier

    def snapshot(self) -> Snapshot:
        return tiny_snapshot(self.environment.rank, self.environment.world_size, self.step)

    def of_all_ranks(self, value: T) -> list[T]:
        self._said[self.environment.rank] = value
        self._barrier.wait()
        said = list(self._said)
        self._barrier.wait()
        return said

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        return [sum(column) for column in zip(*self.of_all_ranks(values))]


def on_threads(ranks: int, function: Callable[[Any], T], seconds: float = 30) -> list[T]:
    """Calls ``function(engine)`` on every rank; returns the results by rank, or raises an error of one of them."""
    said, barrier = [None] * ranks, threading.Barrier(ranks, timeout=seconds)
    with ThreadPoolExecutor(ranks) as threads:
        calls = [threads.submit(function, ThreadEngine(rank, ranks, said, barrier)) for rank in range(ranks)]
        return [call.result() for call in calls]
