"""A map over worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any

from dcscale.data.errors import DataError

Map = Callable[..., Iterator[Any]]
"""``map(function, tasks)``, see :func:`processes`."""


@contextmanager
def processes(workers: int) -> Iterator[Map]:
    """A ``map(function, tasks)`` over worker processes, or in this process for ``workers == 1``.

    It gives the results in the order of the tasks, which it takes only a little ahead of the workers.

    Raises:
        DataError: a worker was killed; what the function raises is raised as it is.
    """
    if workers == 1:
        yield map
        return
    # Not fork, since the caller may have threads; the server imports the package once for all workers.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)

    def run(function: Callable[[Any], Any], tasks: Iterable[Any]) -> Iterator[Any]:
        tasks = iter(tasks)
        running = deque(executor.submit(function, task) for task in islice(tasks, 2 * workers))
        while running:
            yield running.popleft().result()
            running.extend(executor.submit(function, task) for task in islice(tasks, 1))

    try:
        yield run
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, perhaps since memory was short; run again, with fewer --workers if it was"
        ) from error
    finally:
        executor.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which shuts the pool down
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _die_with_parent() -> None:
    """A killed parent cannot shut the pool down; its workers must not write to files that the next one may be using."""
    multiprocessing.parent_process().join()
    os._exit(1)
