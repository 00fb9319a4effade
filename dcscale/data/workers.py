"""Sequences prepared by processes, for where one thread beside the training loop cannot keep up.

Of a rank's sequences, worker w of W makes number w and every W-th after it: it reads lanes of its own, so that W
workers together read no more than one reader would, as long as W times the ranks divides the slots. They write groups
of whole steps into shared memory, and the groups are put back into their order here.

The processes are forked from a server that has neither threads nor GPUs, which the training process has. They are
deaf to the signals that ask a run to stop, since a launcher may send these to every process; they end when the
training process closes them, or is gone.

Axes: W workers, G groups, N sequences, L tokens a sequence; X integers of a sequence: its tokens, targets and, if it
has any, document ids, one after another.
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
from dcscale.data.mixture import Stream
from dcscale.data.packing import Sequences
from dcscale.data.skipping import SkippedShard

Skipped = dict[int, tuple[SkippedShard, ...]]
"""By row, shards that were given up."""

CLOSED = "this iterator was closed, by BatchLoader.close() or a later steps(); call steps() again"

_GROUP_TOKENS, _GROUP_SEQUENCES = 1 << 18, 256
"""A worker hands over at least so many tokens or sequences at once: some milliseconds of its work."""

_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class WorkerSequences:
    """Iterates over the sequences of each step, made by worker processes.

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
        # While the worker fills one place, and the loader holds others, the steps of one more are being handed out.
        shape = (workers, groups + 1, -(-self._group_steps * in_step // workers), self._length * parts + 1)
        try:
            self._memory_WGNX = torch.empty(shape, dtype=torch.int32).share_memory_()
        except RuntimeError as error:
            raise DataError(
                f"data.workers is {workers}, but there are no {np.prod(shape) * 4 / 2**20:,.0f} MiB of shared memory "
                f"for them ({error}); make /dev/shm larger, or set a smaller data.prefetch_steps or data.workers"
            ) from error
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        loader = DataLoader(
            _Shares(stream, steps, self._group_steps, self._memory_WGNX),
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
        done = 0
        for group in _grouped(self._steps, self._group_steps):
            shares = [self._next_share(worker) for worker in range(self._workers)]
            used = [0] * self._workers
            for step in group:
                step_NX = np.empty((len(step), shares[0][0].shape[1]), np.int32)
                skipped: Skipped = {}
                for worker, (share_NX, skipped_of_share) in enumerate(shares):
                    mine = range(len(step))[_places(worker, done, self._workers)]
                    step_NX[mine.start :: self._workers] = share_NX[used[worker] : used[worker] + len(mine)]
                    for row, shards in skipped_of_share.items():
                        if used[worker] <= row < used[worker] + len(mine):
                            skipped[mine[row - used[worker]]] = shards
                    used[worker] += len(mine)
                done += len(step)
                yield _unpacked(step_NX, self._length, skipped)

    def _next_share(self, worker: int) -> tuple[np.ndarray, Skipped]:
        """The sequences of a worker in the next group, int32 [N, X], valid until the group after it is asked for; and
        what was given up for them."""
        try:
            made = next(self._shares)
        except Exception as error:
            dead = [process for process in self._processes if not process.is_alive()]
            if not dead:
                raise
            named = ", ".join(f"{process.pid} (exit code {process.exitcode})" for process in dead)
            raise DataError(
                f"data worker {named} ended by itself; -9 is mostly a lack of memory, for other codes see its last "
                f"words above; start again, perhaps with fewer data.workers"
            ) from error
        if isinstance(made, str):
            raise DataError(made)
        place, skipped = made
        return self._memory_WGNX[worker, place].numpy(), skipped


class _Shares(IterableDataset):
    """What a worker makes: its share of each group. It gives the place in its memory and what was given up for it; or,
    as text, why it cannot."""

    def __init__(
        self,
        stream: Stream,
        steps: Iterable[Sequence[int | None]],
        group_steps: int,
        memory_WGNX: torch.Tensor,
    ) -> None:
        self._reopen, self._fingerprint = stream.reopen, stream.fingerprint
        self._steps, self._group_steps, self._memory_WGNX = steps, group_steps, memory_WGNX

    def __iter__(self) -> Iterator[tuple[int, Skipped] | str]:
        worker = get_worker_info()
        memory_GNX = self._memory_WGNX[worker.id].numpy()
        try:
            stream = self._reopen()
            if stream.fingerprint != self._fingerprint:
                raise DataError("the data were changed while the run was starting; start it again")
            for number, made in enumerate(stream.each(self._numbers(worker.id, worker.num_workers))):
                place = number % len(memory_GNX)
                _pack(made, memory_GNX[place])
                yield place, made.skipped
        except DataError as error:
            yield str(error)

    def _numbers(self, worker: int, workers: int) -> Iterator[list[int | None]]:
        """Numbers of a worker's sequences in each group."""
        done = 0
        for group in _grouped(self._steps, self._group_steps):
            numbers = [g for step in group for g in step]
            yield numbers[_places(worker, done, workers)]
            done += len(numbers)


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


def _places(worker: int, done: int, workers: int) -> slice:
    """Where a worker's sequences are among those that follow ``done`` others."""
    return slice((worker - done) % workers, None, workers)


def _pack(made: Sequences, memory_NX: np.ndarray) -> None:
    parts = (made.tokens_NL1, made.targets_NL, made.document_ids_NL)
    parts = [part for part in parts if part is not None]
    np.concatenate(parts, axis=1, out=memory_NX[: len(made.targets_NL)])


def _unpacked(rows_NX: np.ndarray, length: int, skipped: Skipped) -> Sequences:
    parts = np.split(rows_NX, range(length + 1, rows_NX.shape[1], length), axis=1)
    return Sequences(*parts, skipped=skipped)
