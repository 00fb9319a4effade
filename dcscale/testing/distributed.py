"""A function on N processes joined by gloo, as a launcher would start them.

Ranks that are threads of one process, with a tiny state of their own, for what saves and reads checkpoints.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from typing import Any, TypeVar

import torch
import torch.multiprocessing as multiprocessing

from dcscale.parallel import KINDS, Environment, Snapshot, free_port

_own_servers: set[int] = set()
"""Process ids of the fork servers that were started here."""


def _context() -> multiprocessing.context.BaseContext:
    """How processes start: forked, where no GPU forbids it, from a process that has imported what takes seconds."""
    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context, server = multiprocessing.get_context("forkserver"), forkserver._forkserver
    # A process has one server. That of data workers, which an earlier test may have left, has not made the imports.
    if server._forkserver_pid is None or server._forkserver_pid not in _own_servers:
        server._stop()
        context.set_forkserver_preload(["dcscale.testing.starts"])
        server.ensure_running()
        _own_servers.add(server._forkserver_pid)
    return context


def _child(
    function: Callable,
    environ: dict[str, str],
    rank: int,
    world_size: int,
    port: int,
    answers: Any,
    arguments: tuple,
) -> None:
    os.environ.clear()
    os.environ.update(
        environ,
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    torch.set_num_threads(1)  # torch is loaded already and has read OMP_NUM_THREADS
    try:
        answers.put((rank, function(*arguments), None))
    except BaseException:  # shown by the parent
        answers.put((rank, None, traceback.format_exc()))


def start_ranks(function: Callable, world_size: int, *arguments: Any) -> tuple[list[Any], Any]:
    """Starts ``function(*arguments)`` in ``world_size`` processes; returns them, and the queue of their answers."""
    context = _context()
    answers = context.Queue()
    port = free_port()
    processes = [
        context.Process(
            target=_child,
            args=(function, dict(os.environ), rank, world_size, port, answers, arguments),
            daemon=True,
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes, answers


def run_distributed(function: Callable, world_size: int, *arguments: Any, timeout: float = 300) -> list[Any]:
    """Calls ``function(*arguments)`` in ``world_size`` fresh processes and returns their results by rank.

    ``function`` must be importable (defined at the top of a module) and results picklable.

    Raises:
        AssertionError: a process failed or did not answer within ``timeout`` seconds; shows its traceback.
    """
    processes, answers = start_ranks(function, world_size, *arguments)
    results: list[Any] = [None] * world_size
    try:
        for _ in processes:
            try:
                rank, result, error = answers.get(timeout=timeout)
            except queue.Empty:
                raise AssertionError(f"{function.__name__}: no answer from all ranks within {timeout} s") from None
            assert error is None, f"rank {rank} of {function.__name__} failed:\n{error}"
            results[rank] = result
        for process in processes:
            process.join(timeout=30)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return results


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
    """What :class:`dcscale.checkpoint.Checkpointer` needs of an engine. ``step`` is that of the state it has."""

    dtype = torch.bfloat16

    def __init__(self, rank: int, ranks: int, values: list[Any], barrier: threading.Barrier):
        self.environment = Environment(rank, rank, ranks, ranks, torch.device("cpu"))
        self.step = 0
        self._values, self._barrier = values, barrier

    def snapshot(self) -> Snapshot:
        return tiny_snapshot(self.environment.rank, self.environment.world_size, self.step)

    def gather_objects(self, value: T) -> list[T]:
        self._values[self.environment.rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def sum_over_ranks(self, values: list[int]) -> list[int]:
        return [sum(column) for column in zip(*self.gather_objects(values))]


def on_threads(ranks: int, function: Callable[[Any], T], seconds: float = 30) -> list[T]:
    """Calls ``function(engine)`` on every rank; returns the results by rank, or raises an error of one of them."""
    values, barrier = [None] * ranks, threading.Barrier(ranks, timeout=seconds)
    with ThreadPoolExecutor(ranks) as threads:
        calls = [threads.submit(function, ThreadEngine(rank, ranks, values, barrier)) for rank in range(ranks)]
        return [call.result() for call in calls]
