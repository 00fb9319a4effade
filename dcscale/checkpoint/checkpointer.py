"""Asynchronous, crash-safe checkpointing: a kill at any time leaves a complete checkpoint.

:meth:`Checkpointer._save_stages` is the sequence:

1. copy the training state to the CPU and reserve a folder under a temporary name;
2. every rank writes its part of the optimizer state into the folder;
3. rank 0 reads back what all ranks have written, and writes weights, state and config;
4. rank 0 writes the marker, renames the folder and points ``latest`` at it;
5. rank 0 removes old checkpoints.

A stage starts only after all ranks have reported success of the previous one. If it failed on any rank, all ranks learn
of it, and the earlier checkpoints stay.

Rank 0 makes sure that it still holds the run folder (:mod:`dcscale.lease`) before each change that another start of the
run would see. A start that has lost the folder touches nothing in it any more, not even its own unfinished checkpoint.
"""

from __future__ import annotations

import itertools
import math
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dcscale.checkpoint import layout
from dcscale.checkpoint.layout import (
    CheckpointError,
    FileRecord,
    checkpoints_of,
    incomplete_reason,
    read_state,
    step_of,
)
from dcscale.checkpoint.training_state import TrainingStateReader, write_fragments
from dcscale.checkpoint.weights import save_weights
from dcscale.config import CheckpointConfig
from dcscale.files import (
    TEMPORARY_PREFIX,
    may_succeed_later,
    publish_folder,
    sync_folder,
    sync_tree,
    write_atomically,
    write_json,
)
from dcscale.lease import Lease, LeaseLostError
from dcscale.parallel import Engine, Snapshot


def expired_checkpoints(run: Path, settings: CheckpointConfig, protected: Collection[Path]) -> list[Path]:
    """The complete checkpoints of a run that ``settings`` do not keep, oldest first; none of ``protected``.

    Keeps the newest ``keep_last``, those at multiples of ``keep_every`` steps, and the ``keep_best`` with the lowest
    validation loss (the older one of equals). Incomplete checkpoints do not count as kept and are not returned.

    Raises:
        CheckpointError: a checkpoint's ``state.json`` cannot be read.
    """
    if settings.keep_last is None:
        return []
    complete = [checkpoint for checkpoint in checkpoints_of(run) if incomplete_reason(checkpoint) is None]
    kept = set(complete[-settings.keep_last :])
    if settings.keep_every is not None:
        kept.update(checkpoint for checkpoint in complete if step_of(checkpoint) % settings.keep_every == 0)
    if settings.keep_best is not None:
        losses = {checkpoint: read_state(checkpoint).get("validation_loss") for checkpoint in complete}
        measured = [checkpoint for checkpoint, loss in losses.items() if loss is not None and math.isfinite(loss)]
        kept.update(sorted(measured, key=losses.__getitem__)[: settings.keep_best])
    # ``protected`` may be spelled through links or relative to another folder.
    kept_paths = {checkpoint.resolve() for checkpoint in [*kept, *protected]}
    return [checkpoint for checkpoint in complete if checkpoint.resolve() not in kept_paths]


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint. Renames it first, so that a kill never leaves half of one under its name."""
    doomed = checkpoint.rename(checkpoint.with_name(TEMPORARY_PREFIX + checkpoint.name))
    sync_folder(checkpoint.parent)
    shutil.rmtree(doomed)


T = TypeVar("T")
SaveStages = Generator[Callable[[], Any] | None, list[Any], None]
"""Yields the work of this rank in each stage, or None; receives the results of all ranks, or has a CheckpointError
raised at the yield."""


class _Failure(NamedTuple):
    """An error of one rank, as all ranks learn of it."""

    text: str
    retry: bool
    lease_lost: bool


class Checkpointer:
    """Writes the checkpoints of a run. All ranks call each method together, after the same step.

    A thread writes the files; it touches nothing but files and its copy of the state. Ranks communicate through the
    engine, only from the training loop's thread, and only in :meth:`save`, :meth:`poll` and :meth:`wait`.

    Args:
        engine: the engine whose state is saved.
        run: the run's folder.
        settings: which checkpoints are kept, and whether they are written in the background.
        latest: the checkpoint that the run resumes from.
        protected: a checkpoint that is never removed: the one that the run branched off from.
        lease: what rank 0 holds the run folder by; None: nobody else uses it.
    """

    def __init__(
        self,
        engine: Engine,
        run: Path,
        settings: CheckpointConfig,
        latest: Path | None = None,
        protected: str | None = None,
        lease: Lease | None = None,
    ):
        self._engine, self._settings, self._protected, self._lease = engine, settings, protected, lease
        self._run, self._root = run, run / "checkpoints"
        self._is_main = engine.environment.is_main
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="dcscale-checkpoint")
        self._stages: SaveStages | None = None
        self._task: futures.Future | None = None
        self.latest = latest
        """The newest checkpoint that is known to be complete."""
        self.write_seconds, self.written_bytes = 0.0, 0
        """Seconds from the start of the copy to the rename of ``latest``, and bytes of its files; 0 until this process
        has written a checkpoint."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._stages is not None

    def save(self, step: int, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Copies the training state and starts to write the checkpoint of ``step``; waits for an earlier one first.

        Does nothing if the run was resumed from this very checkpoint. With ``checkpoint.background`` false the
        checkpoint is complete on return.

        Args:
            step: optimizer steps done.
            state: content of ``state.json``.
            files: content of further files, by name.

        Raises:
            CheckpointError: on every rank, if this or the earlier checkpoint could not be written.
            LeaseLostError: on every rank, if another start has taken over the run folder.
        """
        self.wait()
        final = self._root / layout.step_name(step)
        if self.latest is not None and self.latest.resolve() == final.resolve():
            return
        self._stages = self._save_stages(final, state, files)
        self._advance(partial(next, self._stages))
        if not self._settings.background:
            self.wait()

    def poll(self) -> None:
        """Starts the next stage of a checkpoint being written, if all ranks have finished this one; does not wait.

        Costs an all-reduce of one integer, and only while a checkpoint is being written.

        Raises:
            CheckpointError: on every rank, if the checkpoint could not be written; it is abandoned.
            LeaseLostError: on every rank, if another start has taken over the run folder.
        """
        if self._stages is not None:
            finished = self._task is None or self._task.done()
            if self._engine.sum_over_ranks([int(finished)])[0] == self._engine.environment.world_size:
                self._next_stage()

    def wait(self) -> None:
        """Returns once no checkpoint is being written. Raises like :meth:`poll`."""
        while self._stages is not None:
            # Blocking in a collective until the slowest rank has written could exceed the collective's timeout. So
            # wait at most a second for this rank's own task, then poll with a short collective.
            if self._task is not None:
                futures.wait([self._task], timeout=1)
            self.poll()

    def close(self) -> None:
        """Waits for this rank's thread only; a checkpoint being written stays unfinished."""
        self._thread.shutdown()

    # -- the stages ---------------------------------------------------------------------------------------------

    def _save_stages(self, final: Path, state: dict[str, Any], files: Mapping[str, bytes]) -> SaveStages:
        """The whole save. Code between the yields runs in the training loop's thread, yielded calls in the writer's."""
        temporary: Path | None = None
        start = time.perf_counter()
        try:
            copy: list[Snapshot] = []
            bytes_needed = sum(self._call_on_all_ranks(lambda: self._copy_state(copy))) + sum(map(len, files.values()))
            temporary, *_ = self._call_on_all_ranks(self._on_main(lambda: self._reserve(final.name, bytes_needed)))
            parts = yield partial(_write_part, copy, temporary)
            (rest, *_) = yield self._on_main(lambda: self._write_rest(temporary, state, files))
            records = {name: record for part in [*parts, rest] for name, record in part.items()}
            yield self._on_main(lambda: self._publish(temporary, final, records))
        except CheckpointError as error:
            if self._is_main and temporary is not None:
                # What cannot be removed now is removed when the next checkpoint reserves its folder.
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} was not written: {error}", retry=error.retry) from error
        self.latest = final
        self.write_seconds = time.perf_counter() - start
        self.written_bytes = sum(record.bytes for record in records.values())
        try:
            yield self._on_main(self._retain)
        except CheckpointError as error:
            message = f"{final} was written, but older checkpoints were not removed: {error}"
            raise CheckpointError(message, retry=error.retry) from error

    def _copy_state(self, copy: list[Snapshot]) -> int:
        """Puts this rank's part into ``copy``; returns the bytes that it adds to the checkpoint."""
        snapshot = self._engine.snapshot()
        copy.append(snapshot)
        # 12 bytes a parameter: master weight and two moments in float32. Each weight is also written to weights/.
        return snapshot.nbytes + snapshot.nbytes // 12 * self._engine.dtype.itemsize

    def _reserve(self, name: str, bytes_needed: int) -> Path:
        """Removes leftovers of killed processes, checks the free space and makes the temporary folder; returns it.

        It has a random name: a start that has lost the run folder may still be writing the checkpoint of this step.
        """
        self._check_lease()
        self._root.mkdir(parents=True, exist_ok=True)
        for leftover in self._root.glob(TEMPORARY_PREFIX + "*"):
            shutil.rmtree(leftover)
        for leftover in self._root.glob(f".{layout.LATEST}.*"):  # of write_atomically
            leftover.unlink()
        free = shutil.disk_usage(self._root).free
        if free < bytes_needed:
            raise CheckpointError(
                f"{self._root} has {free:,} bytes free, but the checkpoint takes {bytes_needed:,}: free some space, "
                "keep fewer checkpoints (checkpoint.keep_last), or resume a copy of the run on a larger disk "
                "(run.folder)",
                retry=True,
            )
        temporary = self._root / f"{TEMPORARY_PREFIX}{name}-{secrets.token_hex(4)}"
        (temporary / layout.OPTIMIZER).mkdir(parents=True)
        return temporary

    def _write_rest(self, temporary: Path, state: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, FileRecord]:
        """Writes all but the optimizer state; returns the records of these files."""
        # Reading the parts back checks that they are complete, and guarantees that weights/ match the optimizer state.
        saved = TrainingStateReader(temporary / layout.OPTIMIZER)
        save_weights(saved.weights(self._engine.dtype), temporary / layout.WEIGHTS)
        write_json(temporary / layout.STATE, state)
        for name, content in files.items():
            write_atomically(temporary / name, content)
        sync_tree(temporary)
        # The ranks have recorded the files of optimizer/ themselves.
        names = (name for name in layout.files_in(temporary) if not name.startswith(f"{layout.OPTIMIZER}/"))
        return layout.record_files(temporary, names)

    def _publish(self, temporary: Path, final: Path, records: dict[str, FileRecord]) -> None:
        layout.seal(temporary, records)
        if problem := layout.incomplete_reason(temporary):
            raise CheckpointError(problem)
        # A folder that already exists at ``final`` was neither written nor loaded by this process, for example a
        # corrupt checkpoint: it is quarantined.
        self._check_lease()
        publish_folder(temporary, final, _quarantine_path(final))
        self._check_lease()
        point_latest_at(final)

    def _retain(self) -> None:
        """Removes the checkpoints that the settings do not keep."""
        assert self.latest is not None
        protected = {self.latest, *([Path(self._protected)] if self._protected else [])}
        for checkpoint in expired_checkpoints(self._run, self._settings, protected):
            self._check_lease()
            discard(checkpoint)

    def _check_lease(self) -> None:
        if self._lease is not None:
            self._lease.check()

    # -- from stage to stage ------------------------------------------------------------------------------------

    def _on_main(self, call: Callable[[], T]) -> Callable[[], T] | None:
        """``call`` on rank 0, None on the others."""
        return call if self._is_main else None

    def _call_on_all_ranks(self, call: Callable[[], T] | None) -> list[T]:
        """Runs ``call`` on every rank where it is not None; returns the results of all ranks.

        Raises:
            CheckpointError: on all ranks, if it failed on any; lists the errors.
            LeaseLostError: on all ranks, if it was raised on any.
        """
        result = failure = None
        try:
            result = call() if call is not None else None
        except Exception as caught:  # sent to every rank and raised below
            lost = isinstance(caught, LeaseLostError)
            failure = _Failure(
                str(caught) if lost else f"{type(caught).__name__}: {caught}", may_succeed_later(caught), lost
            )
        answers = self._engine.gather_objects((result, failure))
        failures = {rank: failure for rank, (_, failure) in enumerate(answers) if failure is not None}
        for failure in failures.values():
            if failure.lease_lost:
                raise LeaseLostError(failure.text)
        if failures:
            message = "; ".join(f"rank {rank}: {failure.text}" for rank, failure in failures.items())
            retry = all(failure.retry for failure in failures.values())
            raise CheckpointError(message, retry=retry, rank=min(failures))
        return [result for result, _ in answers]

    def _next_stage(self) -> None:
        """Passes the results or errors of the finished stage to the generator, which starts the next one."""
        stages, task = self._stages, self._task
        assert stages is not None
        try:
            results = self._call_on_all_ranks(None if task is None else task.result)
        except (CheckpointError, LeaseLostError) as error:
            self._advance(partial(stages.throw, error))
        else:
            self._advance(partial(stages.send, results))

    def _advance(self, resume: Callable[[], Callable[[], Any] | None]) -> None:
        """Resumes the generator and submits the work of its next stage to the thread."""
        # Cleared first: if ``resume`` raises, no checkpoint is being written any more.
        stages, self._stages, self._task = self._stages, None, None
        try:
            call = resume()
        except StopIteration:
            return
        self._stages, self._task = stages, None if call is None else self._thread.submit(call)


def _write_part(copy: list[Snapshot], folder: Path) -> dict[str, FileRecord]:
    """Writes this rank's part; takes it out of ``copy``, so that its memory is freed at the end."""
    path = write_fragments(copy.pop(), folder / layout.OPTIMIZER)
    return layout.record_files(folder, [str(path.relative_to(folder))])


def point_latest_at(checkpoint: Path) -> None:
    """Writes the checkpoint's name into the file ``latest`` next to it."""
    write_atomically(checkpoint.parent / layout.LATEST, checkpoint.name + "\n")


def quarantine(checkpoint: Path) -> Path:
    """Renames a checkpoint so that it is not found any more; returns its new path."""
    return checkpoint.rename(_quarantine_path(checkpoint))


def _quarantine_path(checkpoint: Path) -> Path:
    """A free name next to the checkpoint: ``quarantined-NAME``, or with a number."""
    names = (f"quarantined-{checkpoint.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    return next(path for name in names if not (path := checkpoint.with_name(name)).exists())
