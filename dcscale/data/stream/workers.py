"""Sequences prepared by worker processes, for when one thread next to the training loop cannot keep up.

Of a rank's sequences, worker w of W prepares number w and every W-th after it. So each worker reads slots of its own,
and W workers together read no more than one reader would, as long as W times the number of ranks divides the slots.
Workers write groups of complete steps into shared memory, each the rows of its own sequences.

The processes are forked from a server, because forking the training process itself, with its threads and GPU, is not
safe. They ignore the signals that ask a run to stop, since a launcher may send these to every process. They end when
the training process closes them or dies.

Axes: G groups, N sequences, L tokens per sequence; X integers of a sequence: its tokens, targets, number of padding
inputs and, with the document mask, document ids, concatenated.
"""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.resource_tracker
import signal
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dcscale.data.errors import DataError
from dcscale.data.shards.skipped import SkippedShard
from dcscale.data.stream.sequences import Sequences
from dcscale.data.stream.stream import Stream
from dcscale.files import exit_with_parent, may_succeed_later
from dcscale.signals import STOP_SIGNALS

Skipped = dict[int, tuple[SkippedShard, ...]]
"""By row, shards that were skipped for it."""

CLOSED = "this iterator was closed, by BatchLoader.close() or a later steps(); call steps() again"

_GROUP_TOKENS, GROUP_SEQUENCES = 1 << 18, 256
"""A worker passes on at least this many tokens or sequences at once: some milliseconds of its work."""


def _memory_shape(
    step_sequences: int,
    length: int,
    workers: int,
    prefetch_steps: int,
    *,
    document_mask: bool,
    group_sequences: int = GROUP_SEQUENCES,
) -> tuple[int, int, tuple[int, int, int]]:
    """Steps of a group, groups that are prefetched, and the shape [G, N, X] of the shared memory."""
    # Groups large enough that passing one on costs little, in complete steps, over all workers.
    sequences = min(-(-_GROUP_TOKENS // length), group_sequences)
    group_steps = -(-sequences * workers // step_sequences)
    groups = max(2, -(-prefetch_steps // group_steps))
    parts = 3 if document_mask else 2
    # One group more than is prefetched: the one whose steps the consumer is using.
    return group_steps, groups, (groups + 1, group_steps * step_sequences, length * parts + 2)


def shared_bytes(
    step_sequences: int, sequence_length: int, workers: int, prefetch_steps: int, document_mask: bool
) -> int:
    """Shared memory that the workers of a rank need, in bytes.

    Args:
        step_sequences: sequences of the rank in a step.
        sequence_length: tokens of a sequence.
        workers: processes, at least 1.
        prefetch_steps: steps to prepare ahead.
        document_mask: whether document ids are prepared too.
    """
    _, _, shape = _memory_shape(step_sequences, sequence_length, workers, prefetch_steps, document_mask=document_mask)
    return 4 * math.prod(shape)


class WorkerSequences:
    """Iterates over the sequences of each step, made by worker processes. They are valid until the next step is taken.

    A group is as many steps as give each worker ``_GROUP_TOKENS`` or ``group_sequences``. Workers prepare
    ``prefetch_steps`` steps ahead, rounded up to complete groups, but at least two groups. Memory of a rank: what
    :class:`dcscale.data.stream.stream.Stream` states, once for all workers together, and shared memory for one group
    more than these, 12 bytes per token.

    Args:
        stream: where the sequences come from; every worker opens it again.
        steps: the sequence numbers of each step, equally many in each; must be picklable.
        workers: processes, at least 1.
        prefetch_steps: steps to prepare ahead.
        group_sequences: sequences of a group for each worker, if they are not too many tokens.

    Raises:
        DataError: there is not enough shared memory.
    """

    def __init__(
        self,
        stream: Stream,
        steps: Iterable[Sequence[int | None]],
        workers: int,
        prefetch_steps: int,
        *,
        group_sequences: int = GROUP_SEQUENCES,
    ) -> None:
        self._steps, self._workers, self._length = steps, workers, stream.identity["sequence_length"]
        # The first step tells how many sequences a step has; without any step, the number does not matter.
        step_sequences = len(next(iter(steps), range(group_sequences)))
        self._group_steps, groups, shape = _memory_shape(
            step_sequences,
            self._length,
            workers,
            prefetch_steps,
            document_mask=stream.identity["document_mask"],
            group_sequences=group_sequences,
        )
        try:
            self._memory_GNX = torch.empty(shape, dtype=torch.int32).share_memory_()
        except RuntimeError as error:
            raise DataError(
                f"data.workers is {workers}, but the {np.prod(shape) * 4 / 2**20:,.0f} MiB of shared memory that they "
                f"need cannot be allocated ({error}); make /dev/shm larger, or set a smaller data.prefetch_steps or "
                f"data.workers"
            ) from error
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        loader = DataLoader(
            _WorkerDataset(stream, steps, self._group_steps, self._memory_GNX),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=groups,
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            generator=torch.Generator(),  # otherwise it draws from the training process's global generator
        )
        other_processes = multiprocessing.active_children()
        multiprocessing.resource_tracker.ensure_running()  # start it before: starting it unblocks signals
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # the workers inherit it
        try:
            self._loader_iterator = iter(loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._processes = [process for process in multiprocessing.active_children() if process not in other_processes]
        self._step_iterator = self._iterate_steps()
        self._end: BaseException | None = None

    def __iter__(self) -> Iterator[Sequences]:
        return self

    def __next__(self) -> Sequences:
        if self._end is None:
            try:
                return next(self._step_iterator)
            except BaseException as error:  # including StopIteration: an ended iterator stays ended
                self._end = error
        raise self._end

    def interrupt(self) -> None:
        """Fail a thread that waits for a step, with a DataError."""
        for process in self._processes:
            process.kill()

    def close(self) -> None:
        """End the processes."""
        self._end = RuntimeError(CLOSED)
        self._loader_iterator = None  # DataLoader then shuts its workers down, and waits some seconds for them
        for process in self._processes:
            process.kill()
            process.join()

    def _iterate_steps(self) -> Iterator[Sequences]:
        buffers, rows, _ = self._memory_GNX.shape
        for number, group in enumerate(_grouped(self._steps, self._group_steps)):
            skipped: Skipped = {}
            for worker in range(self._workers):
                worker_rows = range(rows)[_rows_of_worker(worker, self._workers, number, rows)]
                skipped |= {worker_rows[row]: shards for row, shards in self._wait_for_worker().items()}
            group_NX = self._memory_GNX[number % buffers].numpy()
            yield from _unpack(group_NX, self._length, skipped).split(map(len, group))

    def _wait_for_worker(self) -> Skipped:
        """Wait for a worker's part of the next group; DataLoader takes the workers in turn.

        The part stays in shared memory until the group after the next is requested.

        Returns:
            What was skipped for the part.
        """
        try:
            result = next(self._loader_iterator)
        except Exception as error:
            dead = [process for process in self._processes if process.exitcode]
            if not dead:
                raise
            names = ", ".join(f"{process.pid} (exit code {process.exitcode})" for process in dead)
            raise DataError(
                f"data worker {names} died; -9 usually means out of memory, for other codes see its last output above; "
                f"start again, perhaps with fewer data.workers",
                retry=True,
            ) from error
        if isinstance(result, DataError):
            raise result
        return result


class _WorkerDataset(IterableDataset):
    """Writes a worker's part of each group into shared memory, and yields what was skipped for it.

    A DataError is yielded: if it were raised, DataLoader would add a traceback to its message.
    """

    def __init__(
        self,
        stream: Stream,
        steps: Iterable[Sequence[int | None]],
        group_steps: int,
        memory_GNX: torch.Tensor,
    ) -> None:
        self._reopen, self._fingerprint = stream.reopen, stream.fingerprint
        self._steps, self._group_steps, self._memory_GNX = steps, group_steps, memory_GNX

    def __iter__(self) -> Iterator[Skipped | DataError]:
        worker = get_worker_info()
        memory_GNX = self._memory_GNX.numpy()
        try:
            stream = self._reopen()
            if stream.fingerprint != self._fingerprint:
                raise DataError("the data changed while the run was starting; start it again")
            for number, sequences in enumerate(stream.each(self._numbers(worker.id, worker.num_workers))):
                rows = _rows_of_worker(worker.id, worker.num_workers, number, memory_GNX.shape[1])
                _pack(sequences, memory_GNX[number % len(memory_GNX), rows])
                yield sequences.skipped
        except DataError as error:
            yield DataError(str(error), retry=may_succeed_later(error))

    def _numbers(self, worker: int, workers: int) -> Iterator[list[int | None]]:
        """Sequence numbers of a worker in each group."""
        for number, group in enumerate(_grouped(self._steps, self._group_steps)):
            numbers = [g for step in group for g in step]
            yield numbers[_rows_of_worker(worker, workers, number, self._memory_GNX.shape[1])]


def _start_worker(_: int) -> None:
    exit_with_parent()  # DataLoader watches the fork server instead, which lives as long as its workers


def _grouped(steps: Iterable[Any], size: int) -> Iterator[list[Any]]:
    steps = iter(steps)
    while group := list(islice(steps, size)):
        yield group


def _rows_of_worker(worker: int, workers: int, group: int, rows: int) -> slice:
    """Rows of a group that belong to a worker, if all earlier groups had ``rows`` rows.

    They are those with (group * rows + row) mod workers = worker.
    """
    return slice((worker - group * rows) % workers, None, workers)


def _pack(sequences: Sequences, memory_NX: np.ndarray) -> None:
    parts = [sequences.tokens_NL1, sequences.targets_NL, sequences.padding_N[:, None]]
    if sequences.document_ids_NL is not None:
        parts.append(sequences.document_ids_NL)
    np.concatenate(parts, axis=1, out=memory_NX[: len(sequences.targets_NL)])


def _unpack(rows_NX: np.ndarray, length: int, skipped: Skipped) -> Sequences:
    """The inverse of :func:`_pack`, as views: L + 1 tokens, L targets, a count and, if any are left, L document ids."""
    tokens_NL1, targets_NL, padding_N1, ids_NL = np.split(rows_NX, [length + 1, 2 * length + 1, 2 * length + 2], axis=1)
    return Sequences(tokens_NL1, targets_NL, padding_N1[:, 0], ids_NL if ids_NL.shape[1] else None, skipped)
