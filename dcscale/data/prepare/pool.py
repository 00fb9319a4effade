"""A map over worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any

from dcscale.data.errors import DataError
from dcscale.files import exit_with_parent

PoolMap = Callable[..., Iterator[Any]]
"""``pool_map(function, tasks)``, see :func:`worker_pool`."""


@contextmanager
def worker_pool(workers: int) -> Iterator[PoolMap]:
    """Yield a ``pool_map(function, tasks)`` over worker processes; with ``workers == 1`` it runs in this process.

    It yields the results in the order of the tasks, and takes tasks from their iterator only a little ahead of the
    workers.

    Raises:
        DataError: a worker was killed. Exceptions of the function are raised unchanged.
    """
    if workers == 1:
        yield map
        return
    # Not fork, since the caller may have threads. The fork server imports the package once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def pool_map(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        # Not Executor.map, which would take all tasks at once and hold the whole corpus in memory.
        running = deque(executor.submit(function, task) for task in islice(tasks, 2 * workers))
        while running:
            yield running.popleft().result()
            running.extend(executor.submit(function, task) for task in islice(tasks, 1))

    try:
        yield pool_map
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, possibly because memory ran out; in that case run again with fewer --workers"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which shuts the pool down
    exit_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the pool uses all cores already
