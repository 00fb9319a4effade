"""Batches for the training loop: which sequences a rank uses in which step, and preparing them ahead.

Axes: B sequences of a micro-batch, L tokens per sequence.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dcscale.data.errors import DataError
from dcscale.data.shards.manifest import TokenizerInfo
from dcscale.data.shards.skipped import SkippedShard
from dcscale.data.stream.sequences import IGNORED, Sequences
from dcscale.data.stream.stream import SequenceStream, Stream
from dcscale.data.stream.workers import CLOSED, GROUP_SEQUENCES, WorkerSequences


@dataclass(frozen=True)
class Batch:
    """One micro-batch."""

    input_ids: torch.Tensor
    """int64 [B, L]."""

    targets: torch.Tensor
    """int64 [B, L]; -100 where there is no loss."""

    document_ids: torch.Tensor | None
    """int32 [B, L], from 0 in each row; None without the document mask."""

    target_count: int
    """Targets with a loss; a batch may have none."""

    padding_count: int
    """Inputs that are padding, which have no loss."""

    skipped: tuple[SkippedShard, ...] = ()
    """Shards that were skipped when its blocks were built."""

    def to(self, device: torch.device) -> Batch:
        """The batch with its tensors on ``device``."""
        tensors = (self.input_ids, self.targets, self.document_ids)
        moved = (x if x is None else x.to(device, non_blocking=True) for x in tensors)
        return Batch(*moved, self.target_count, self.padding_count, self.skipped)


@dataclass(frozen=True)
class _RankNumbers:
    """Iterates over the sequence numbers of each step of a rank; None is a row of padding."""

    consumed: int
    global_batch_size: int
    rank: int
    world_size: int
    limit: int | None
    sequences_per_epoch: int | None

    def __iter__(self) -> Iterator[Sequence[int | None]]:
        begin = self.consumed
        while self.limit is None or begin < self.limit:
            end = begin + self.global_batch_size
            numbers = range(begin + self.rank, end, self.world_size)
            # Interleaving ranks keeps a sequence's step independent of the number of ranks.
            yield numbers if self.limit is None else [self._spread(g) for g in numbers]
            begin = end

    def _spread(self, g: int) -> int | None:
        """The stream's number of the g-th of ``limit`` sequences spread evenly over an epoch; None beyond the limit."""
        return g * self.sequences_per_epoch // self.limit if g < self.limit else None


class BatchLoader:
    """A rank's batches of a stream. Stateless: the count of sequences used so far determines the next step.

    A step after c sequences consists of numbers [c, c + global_batch_size). Of these, rank r takes the r-th and every
    ``world_size``-th after it, split into micro-batches in that order. So a run resumes with the same sequences on any
    number of ranks and with any number of workers. Another batch size would work too, but the trainer refuses it.

    Args:
        stream: where the sequences come from.
        global_batch_size: sequences per step, over all ranks; a multiple of ``micro_batch_size * world_size``.
        micro_batch_size: sequences per batch.
        rank: this process, from 0 to ``world_size - 1``.
        world_size: number of processes.
        prefetch_steps: steps prepared ahead by a thread; 0 prepares each step when it is requested.
        workers: processes that prepare steps ahead instead of the thread, at least ``prefetch_steps``; see
            :class:`dcscale.data.stream.workers.WorkerSequences`.
        limit: use only ``limit`` sequences, spread evenly over epoch 0 (at most all of it), so that a part of the
            validation data represents all of it. Missing rows of the last step are masked.
        group_sequences: sequences that a worker passes on at once, see ``WorkerSequences``.

    Raises:
        DataError: the sizes do not fit, or a shard of this rank's share is missing or has the wrong size.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        prefetch_steps: int = 0,
        workers: int = 0,
        limit: int | None = None,
        group_sequences: int = GROUP_SEQUENCES,
    ) -> None:
        for name, value, minimum in (
            ("micro_batch_size", micro_batch_size, 1),
            ("global_batch_size", global_batch_size, 1),
            ("world_size", world_size, 1),
            ("prefetch_steps", prefetch_steps, 0),
            ("workers", workers, 0),
            ("limit", 1 if limit is None else limit, 1),
        ):
            if value < minimum:
                raise DataError(f"{name} is {value}, but must be at least {minimum}")
        if not 0 <= rank < world_size:
            raise DataError(f"rank is {rank}, but must be from 0 to world_size - 1, {world_size - 1}")
        if global_batch_size % (micro_batch_size * world_size):
            raise DataError(
                f"global_batch_size is {global_batch_size}, but must be a multiple of micro_batch_size * world_size, "
                f"{micro_batch_size} * {world_size}; change one of the three"
            )
        stream.check_shard_files(rank, world_size)
        self._stream = stream
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._rank = rank
        self._world_size = world_size
        self._prefetch_steps = prefetch_steps
        self._workers = workers
        self._group_sequences = group_sequences
        self._per_epoch = stream.sequences_per_epoch if isinstance(stream, SequenceStream) else None
        # In a mixture each source has epochs of its own length.
        if limit is not None and self._per_epoch is None:
            raise DataError(f"limit is {limit}, but a mixture has no epoch that it could be a part of")
        self._limit = None if limit is None else min(limit, self._per_epoch)
        self._prefetcher: _PrefetchThread | WorkerSequences | None = None

    @property
    def tokenizer(self) -> TokenizerInfo:
        """The tokenizer that made the stream's tokens."""
        return self._stream.tokenizer

    @property
    def stream(self) -> Stream:
        """Where the sequences come from."""
        return self._stream

    def numbers(self, consumed: int) -> list[Sequence[int | None]]:
        """The sequence numbers of each of the rank's micro-batches in the step after ``consumed`` sequences."""
        numbers, size = next(iter(self._rank_numbers(consumed))), self._micro_batch_size
        return [numbers[begin : begin + size] for begin in range(0, len(numbers), size)]

    def epochs(self, consumed: int) -> dict[str, float]:
        """How many epochs of each source ``consumed`` sequences are, by name; a single source has the empty name."""
        return self._stream.epochs(consumed)

    def steps(self, consumed: int = 0) -> Iterator[list[Batch]]:
        """The rank's micro-batches of each step after ``consumed`` sequences; endless without ``limit``.

        Closes the iterator of an earlier call.

        Raises:
            DataError: ``consumed`` is negative; or, while iterating, a shard cannot be used or a worker has died.
        """
        if consumed < 0:
            raise DataError(f"consumed is {consumed}, but must not be negative")
        self.close()
        numbers = self._rank_numbers(consumed)
        if self._workers:
            self._prefetcher = WorkerSequences(
                self._stream, numbers, self._workers, self._prefetch_steps, group_sequences=self._group_sequences
            )
            return map(self._batches, self._prefetcher)
        steps = map(self._batches, self._stream.each(numbers))
        if not self._prefetch_steps:
            return steps
        self._prefetcher = _PrefetchThread(steps, self._prefetch_steps)
        return self._prefetcher

    def skip(self, sha256: Collection[str]) -> None:
        """Skip the shards with these checksums too, from the next call of :meth:`steps` on, which must follow.

        Raises:
            DataError: more would be lost than allowed.
        """
        self.close()
        self._stream.skip(sha256)

    def interrupt(self) -> None:
        """Fail a thread that waits for a batch, with a DataError. Any thread may call it; :meth:`close` must follow."""
        self._stream.close()
        if isinstance(self._prefetcher, WorkerSequences):
            self._prefetcher.interrupt()

    def close(self) -> None:
        """Stop prefetching; afterwards no thread or worker is left. :meth:`steps` may be called again."""
        self._stream.close()
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rank_numbers(self, consumed: int) -> _RankNumbers:
        return _RankNumbers(
            consumed, self._global_batch_size, self._rank, self._world_size, self._limit, self._per_epoch
        )

    def _batches(self, sequences: Sequences) -> list[Batch]:
        def batch(rows: slice) -> Batch:
            ids = sequences.document_ids_NL
            # Copies: the sequences of workers are in shared memory that is written again.
            return Batch(
                torch.from_numpy(sequences.tokens_NL1[rows, :-1].astype(np.int64)),
                torch.from_numpy(sequences.targets_NL[rows].astype(np.int64)),
                None if ids is None else torch.from_numpy(ids[rows].copy()),
                int(np.count_nonzero(sequences.targets_NL[rows] != IGNORED)),
                int(sequences.padding_N[rows].sum()),
                tuple(
                    {shard for row, shards in sequences.skipped.items() if row in all_rows[rows] for shard in shards}
                ),
            )

        size, all_rows = self._micro_batch_size, range(len(sequences.targets_NL))
        return [batch(slice(begin, begin + size)) for begin in all_rows[::size]]


class _PrefetchThread:
    """Runs an iterator in a thread, at most ``depth`` items ahead of its consumer, to which it passes on any error."""

    def __init__(self, steps: Iterator[list[Batch]], depth: int) -> None:
        self._free = threading.Semaphore(depth)
        self._ready: queue.SimpleQueue = queue.SimpleQueue()
        self._closed = False
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(steps,), name="dcscale-prefetch", daemon=True)
        self._thread.start()

    def _run(self, steps: Iterator[list[Batch]]) -> None:
        try:
            while True:
                self._free.acquire()  # released when the consumer takes an item, and by close()
                if self._closed:
                    return
                self._ready.put((next(steps), None))
        except BaseException as error:  # including StopIteration: whatever ends the steps ends the consumer's iteration
            self._ready.put((None, error))

    def __iter__(self) -> _PrefetchThread:
        return self

    def __next__(self) -> list[Batch]:
        if self._closed:
            raise RuntimeError(CLOSED)
        if self._end is None:
            item, self._end = self._ready.get()
            self._free.release()
        if self._end is not None:
            raise self._end
        return item

    def close(self) -> None:
        self._closed = True
        self._free.release()
        self._thread.join()
