"""Sequences prepared by processes, for where one thread beside the training loop cannot keep up.

Of a rank's sequences, worker w of W makes number w and every W-th after it: it reads lanes of its own, so that W
workers together read no more than one reader would, as long as W times the ranks divides the slots. They write into
the same shared memory, each the rows that are its own, of groups of whole steps.

The processes are forked from a server that has neither threads nor GPUs, which the training process has. They are
deaf to the signals that ask a run to stop, since a launcher may send these to every process; they end when the
training process closes them, or is gone.

Axes: G groups, N sequences, L tokens a sequence; X integers of a sequence: its tokens, targets and, if it has any,
document ids, one after another.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.resource_tracker
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dcscale.data.errors import DataError
from dcscale.data.shards.skipped import SkippedShard
from dcscale.data.stream.mixture import Stream
from dcscale.data.stream.sequences import Sequences

Skipped = dict[int, tuple[SkippedShard, ...]]
"""By row, shards that were given up."""

CLOSED = "this iterator was closed, by BatchLoader.close() or a later steps(); call steps() again"

_GROUP_TOKENS, _GROUP_SEQUENCES = 1 << 18, 256
"""A worker hands over at least so many tokens or sequences at once: some milliseconds of its work."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class WorkerSequences:
    """Iterates over the sequences of each step, made by worker processes; they are valid until the next are asked for.

    A group is as many steps as give each worker ``_GROUP_TOKENS`` or ``_GROUP_SEQUENCES``. Ready or being made are
    ``ahead`` steps, rounded up to whole groups, but at least two groups. Memory of a rank: what its stream states, once
    for all workers together, and shared memory for one group more than these, of 12 bytes a token.

    Args:
        stream: where the sequences come from; every worker opens it anew.
        steps: the numbers of each step's sequences, the same count in each; sent to the workers.
        workers: processes, at least 1.
        ahead: steps to prepare ahead.

    Raises:
        DataError: there is not enough shared memory.
    """

    def __init__(self, stream: Stream, steps: Iterable[Sequence[int | None]], workers: int, ahead: int) -> None:
        self._steps, self._workers, self._length = steps, workers, stream.identity["sequence_length"]
        sequences = min(-(-_GROUP_TOKENS // self._length), _GROUP_SEQUENCES)
        in_step = len(next(iter(steps), range(sequences)))
        self._group_steps = -(-sequences * workers // in_step)
        groups = max(2, -(-ahead // self._group_steps))
        parts = 3 if stream.identity["document_mask"] else 2
        # While workers fill one place, and the loader holds others, the steps of one more are being handed out.
        shape = (groups + 1, self._group_steps * in_step, self._length * parts + 1)
        try:
            self._memory_GNX = torch.empty(shape, dtype=torch.int32).share_memory_()
        except RuntimeError as error:
            raise DataError(
                f"data.workers is {workers}, but there are no {np.prod(shape) * 4 / 2**20:,.0f} MiB of shared memory "
                f"for them ({error}); make /dev/shm larger, or set a smaller data.prefetch_steps or data.workers"
            ) from error
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        loader = DataLoader(
            _Shares(stream, steps, self._group_steps, self._memory_GNX),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=groups,
            worker_init_fn=_end_with_the_training_process,
            multiprocessing_context=context,
            generator=torch.Generator(),  # or it would draw from the one of the training process
        )
        others = multiprocessing.active_children()
        multiprocessing.resource_tracker.ensure_running()  # when it starts, it unblocks signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)  # the processes inherit it
        try:
            self._shares = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes = [process for process in multiprocessing.active_children() if process not in others]
        self._ready = self._make_steps()
        self._end: BaseException | None = None

    def __iter__(self) -> Iterator[Sequences]:
        return self

    def __next__(self) -> Sequences:
        if self._end is None:
            try:
                return next(self._ready)
            except BaseException as error:  # StopIteration too: an iterator that has ended does not go on
                self._end = error
        raise self._end

    def interrupt(self) -> None:
        """Free who waits for a step, with a DataError."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the processes."""
        self._end = RuntimeError(CLOSED)
        self._shares = None  # this shuts them down, and waits some seconds for it
        for process in self._processes:
            process.kill()
            process.join()

    def _make_steps(self) -> Iterator[Sequences]:
        places, rows, _ = self._memory_GNX.shape
        for number, group in enumerate(_grouped(self._steps, self._group_steps)):
            skipped: Skipped = {}
            for worker in range(self._workers):
                mine = range(rows)[_share_of(worker, self._workers, number, rows)]
                skipped |= {mine[row]: shards for row, shards in self._next_share().items()}
            made_NX = self._memory_GNX[number % places].numpy()
            yield from _unpacked(made_NX, self._length, skipped).split(map(len, group))

    def _next_share(self) -> Skipped:
        """Wait for a worker's share of the next group; what was given up for it. Its memory holds until the group after
        it is asked for."""
        try:
            made = next(self._shares)
        except Exception as error:
            dead = [process for process in self._processes if process.exitcode]
            if not dead:
                raise
            named = ", ".join(f"{process.pid} (exit code {process.exitcode})" for process in dead)
            raise DataError(
                f"data worker {named} ended by itself; -9 is mostly a lack of memory, for other codes see its last "
                f"words above; start again, perhaps with fewer data.workers"
            ) from error
        if isinstance(made, str):
            raise DataError(made)
        return made


class _Shares(IterableDataset):
    """What a worker makes: its share of each group, in shared memory. It gives what was given up for it; or, as text,
    why it cannot."""

    def __init__(
        self,
        stream: Stream,
        steps: Iterable[Sequence[int | None]],
        group_steps: int,
        memory_GNX: torch.Tensor,
    ) -> None:
        self._reopen, self._fingerprint = stream.reopen, stream.fingerprint
        self._steps, self._group_steps, self._memory_GNX = steps, group_steps, memory_GNX

    def __iter__(self) -> Iterator[Skipped | str]:
        worker = get_worker_info()
        memory_GNX = self._memory_GNX.numpy()
        try:
            stream = self._reopen()
            if stream.fingerprint != self._fingerprint:
                raise DataError("the data were changed while the run was starting; start it again")
            for number, made in enumerate(stream.each(self._numbers(worker.id, worker.num_workers))):
                mine = _share_of(worker.id, worker.num_workers, number, memory_GNX.shape[1])
                _pack(made, memory_GNX[number % len(memory_GNX), mine])
                yield made.skipped
        except DataError as error:
            yield str(error)

    def _numbers(self, worker: int, workers: int) -> Iterator[list[int | None]]:
        """Numbers of a worker's sequences in each group."""
        for number, group in enumerate(_grouped(self._steps, self._group_steps)):
            numbers = [g for step in group for g in step]
            yield numbers[_share_of(worker, workers, number, self._memory_GNX.shape[1])]


def _end_with_the_training_process(_: int) -> None:
    """DataLoader's own watch is over the server, which lives as long as a worker does."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _grouped(steps: Iterable[Any], size: int) -> Iterator[list[Any]]:
    steps = iter(steps)
    while group := list(islice(steps, size)):
        yield group


def _share_of(worker: int, workers: int, group: int, rows: int) -> slice:
    """Which sequences of a group are a worker's, where all groups before it had so many ``rows``."""
    return slice((worker - group * rows) % workers, None, workers)


def _pack(made: Sequences, memory_NX: np.ndarray) -> None:
    parts = (made.tokens_NL1, made.targets_NL, made.document_ids_NL)
    parts = [part for part in parts if part is not None]
    np.concatenate(parts, axis=1, out=memory_NX[: len(made.targets_NL)])


def _unpacked(rows_NX: np.ndarray, length: int, skipped: Skipped) -> Sequences:
    parts = np.split(rows_NX, range(length + 1, rows_NX.shape[1], length), axis=1)
    return Sequences(*parts, skipped=skipped)
