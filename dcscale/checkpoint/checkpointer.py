"""Asynchronous, crash-safe checkpointing: whatever is killed when, a run always has a complete checkpoint.

:meth:`Checkpoints._save_stages` is the sequence: copy the state; reserve a folder under a temporary name; each rank
writes its part into it; rank 0 reads back what all have written and adds the rest; write the marker, rename the folder,
point ``latest`` at it; remove old checkpoints. A stage begins only when all ranks have reported that the one before
succeeded; if it failed on any, all know, and the earlier checkpoints stay.
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Callable, Collection, Generator, Mapping
from concurrent import futures
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dcscale.checkpoint import layout
from dcscale.checkpoint.layout import (
    TEMPORARY_PREFIX,
    CheckpointError,
    Written,
    checkpoints_of,
    incomplete_reason,
    read_state,
    step_of,
)
from dcscale.checkpoint.training_state import Fragments, write_fragments
from dcscale.checkpoint.weights import save_weights
from dcscale.config import CheckpointConfig
from dcscale.files import sync_folder, sync_tree, write_atomically, write_json
from dcscale.parallel import Engine, Snapshot


def expired_checkpoints(run: Path, settings: CheckpointConfig, protected: Collection[Path]) -> list[Path]:
    """The whole checkpoints of a run that ``settings`` do not keep, oldest first; none of ``protected``.

    Kept are the newest ``keep_last``, those of every ``keep_every`` steps, and the ``keep_best`` of the lowest
    validation loss, the older of equal ones. A damaged checkpoint neither takes the place of a whole one nor is named.

    Raises:
        CheckpointError: a checkpoint's ``state.json`` cannot be read.
    """
    if settings.keep_last is None:
        return []
    whole = [checkpoint for checkpoint in checkpoints_of(run) if incomplete_reason(checkpoint) is None]
    kept = set(whole[-settings.keep_last :])
    if settings.keep_every is not None:
        kept.update(checkpoint for checkpoint in whole if step_of(checkpoint) % settings.keep_every == 0)
    if settings.keep_best is not None:
        losses = {checkpoint: read_state(checkpoint).get("validation_loss") for checkpoint in whole}
        measured = [checkpoint for checkpoint, loss in losses.items() if loss is not None and math.isfinite(loss)]
        kept.update(sorted(measured, key=losses.__getitem__)[: settings.keep_best])
    kept_places = {checkpoint.resolve() for checkpoint in [*kept, *protected]}
    return [checkpoint for checkpoint in whole if checkpoint.resolve() not in kept_places]


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint; it has lost its name before it loses its first file."""
    doomed = checkpoint.rename(checkpoint.with_name(TEMPORARY_PREFIX + checkpoint.name))
    sync_folder(checkpoint.parent)
    shutil.rmtree(doomed)


T = TypeVar("T")
SaveStages = Generator[Callable[[], Any] | None, list[Any], None]
"""Yields what this rank does in each stage, if anything; gets the results of all ranks, or their errors raised."""


class Checkpoints:
    """The checkpoints of a run. All ranks call each method together, after the same step.

    Writing goes on in a thread, which touches nothing but files and its copy of the state. The ranks' words go through
    the engine, from the training loop's thread, in :meth:`save`, :meth:`poll` and :meth:`wait` only.

    Args:
        latest: the checkpoint the run goes on from.
        protected: a checkpoint that is never removed: the one the run branched from.
    """

    def __init__(
        self,
        engine: Engine,
        run: Path,
        settings: CheckpointConfig,
        latest: Path | None = None,
        protected: str | None = None,
    ):
        self._engine, self._settings, self._spared = engine, settings, protected
        self._run, self._root = run, run / "checkpoints"
        self._is_main = engine.environment.is_main
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="dcscale-checkpoint")
        self._stages: SaveStages | None = None
        self._task: futures.Future | None = None
        self.latest = latest
        """The newest checkpoint that is known to be whole."""
        self.write_seconds, self.written_bytes = 0.0, 0
        """Of ``latest``, once this start has written it: seconds from the copied state to its name; bytes of files."""

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._stages is not None

    def save(self, step: int, state: dict[str, Any], files: Mapping[str, bytes]) -> None:
        """Copies the training state and begins to write the checkpoint of ``step``; waits for an earlier one first.

        ``state`` is the content of ``state.json``; ``files`` are further ones, by name. Without
        ``checkpoint.background`` the checkpoint is written at the return. Does nothing if the run goes on from it.

        Raises:
            CheckpointError: on every rank, if this or the earlier checkpoint could not be written.
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
        """Takes a checkpoint under way one stage on, if all ranks are through with this one; does not wait.

        Costs the sum of one integer over the ranks, and only while a checkpoint is under way.

        Raises:
            CheckpointError: on every rank, if it could not be written; it is given up.
        """
        if self._stages is not None:
            through = self._task is None or self._task.done()
            if self._engine.sum_over_ranks([int(through)])[0] == self._engine.environment.world_size:
                self._next_stage()

    def wait(self) -> None:
        """Returns once no checkpoint is under way any more. Raises CheckpointError as :meth:`poll`."""
        while self._stages is not None:
            # No rank waits for another's disk within a collective, which has a time limit.
            if self._task is not None:
                futures.wait([self._task], timeout=1)
            self.poll()

    def close(self) -> None:
        """Waits for this rank's thread only; a checkpoint under way stays unfinished."""
        self._thread.shutdown()

    # -- the stages ---------------------------------------------------------------------------------------------

    def _save_stages(self, final: Path, state: dict[str, Any], files: Mapping[str, bytes]) -> SaveStages:
        temporary = self._root / (layout.TEMPORARY_PREFIX + final.name)
        start = time.perf_counter()
        try:
            copy: list[Snapshot] = []
            bytes_needed = sum(self._agree(lambda: self._copy_state(copy))) + sum(map(len, files.values()))
            self._agree(self._on_main(lambda: self._reserve(temporary, bytes_needed)))
            parts = yield partial(_write_part, copy, temporary)
            (rest, *_) = yield self._on_main(lambda: self._write_rest(temporary, state, files))
            written = {name: file for part in [*parts, rest] for name, file in part.items()}
            yield self._on_main(lambda: self._publish(temporary, final, written))
        except CheckpointError as error:
            if self._is_main:  # what cannot be removed now is when the next one is reserved
                shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(f"checkpoint {final} was not written: {error}") from error
        self.latest = final
        self.write_seconds = time.perf_counter() - start
        self.written_bytes = sum(file.bytes for file in written.values())
        try:
            yield self._on_main(self._retain)
        except CheckpointError as error:
            raise CheckpointError(f"{final} was written, but older checkpoints were not removed: {error}") from error

    def _copy_state(self, copy: list[Snapshot]) -> int:
        """Puts this rank's part into ``copy``; returns the bytes that it adds to the checkpoint."""
        snapshot = self._engine.snapshot()
        copy.append(snapshot)
        # Of three float32 values an element, one is written again as a weight.
        return snapshot.nbytes + snapshot.nbytes // 12 * self._engine.dtype.itemsize

    def _reserve(self, temporary: Path, bytes_needed: int) -> None:
        self._root.mkdir(parents=True, exist_ok=True)
        for leftover in self._root.glob(layout.TEMPORARY_PREFIX + "*"):
            shutil.rmtree(leftover)
        for leftover in self._root.glob(f".{layout.LATEST}.*"):
            leftover.unlink()
        free = shutil.disk_usage(self._root).free
        if free < bytes_needed:
            raise CheckpointError(
                f"{self._root} has {free:,} bytes free, but the checkpoint takes {bytes_needed:,}: make room, keep "
                "fewer (checkpoint.keep_last), or go on with a copy of the run on a larger disk (run.folder)"
            )
        (temporary / layout.OPTIMIZER).mkdir(parents=True)

    def _write_rest(self, temporary: Path, state: dict[str, Any], files: Mapping[str, bytes]) -> dict[str, Written]:
        # Reading the parts back proves them whole; and so the weights can never be others than the optimizer's.
        fragments = Fragments(temporary / layout.OPTIMIZER)
        save_weights(fragments.weights(self._engine.dtype), temporary / layout.WEIGHTS)
        write_json(temporary / layout.STATE, state)
        for name, content in files.items():
            write_atomically(temporary / name, content)
        sync_tree(temporary)
        names = (name for name in layout.files_in(temporary) if not name.startswith(f"{layout.OPTIMIZER}/"))
        return layout.written(temporary, names)

    def _publish(self, temporary: Path, final: Path, written: dict[str, Written]) -> None:
        layout.seal(temporary, written)
        if problem := layout.incomplete_reason(temporary):
            raise CheckpointError(problem)
        if final.exists():  # this course of the run did not go on from it, nor write it
            quarantine(final)
        temporary.rename(final)
        sync_folder(self._root)
        point_latest_at(final)

    def _retain(self) -> None:
        assert self.latest is not None
        protected = {self.latest, *([Path(self._spared)] if self._spared else [])}
        for checkpoint in expired_checkpoints(self._run, self._settings, protected):
            discard(checkpoint)

    # -- how it goes on ----------------------------------------------------------------------------------------

    def _on_main(self, call: Callable[[], T]) -> Callable[[], T] | None:
        return call if self._is_main else None

    def _agree(self, call: Callable[[], T] | None) -> list[T]:
        """Calls on every rank that has a call, and returns all results; if any fails, raises on all, in their words."""
        result = error = None
        try:
            result = call() if call is not None else None
        except Exception as caught:  # told to every rank and raised below
            error = f"{type(caught).__name__}: {caught}"
        answers = self._engine.gather_objects((result, error))
        errors = [f"rank {rank}: {error}" for rank, (_, error) in enumerate(answers) if error is not None]
        if errors:
            raise CheckpointError("; ".join(errors))
        return [result for result, _ in answers]

    def _next_stage(self) -> None:
        stages, task = self._stages, self._task
        assert stages is not None
        try:
            results = self._agree(None if task is None else task.result)
        except CheckpointError as error:
            self._advance(partial(stages.throw, error))
        else:
            self._advance(partial(stages.send, results))

    def _advance(self, resume: Callable[[], Callable[[], Any] | None]) -> None:
        """Takes the stages to its next stage, which then runs in the thread."""
        stages, self._stages, self._task = self._stages, None, None
        try:
            call = resume()
        except StopIteration:
            return
        self._stages, self._task = stages, None if call is None else self._thread.submit(call)


def _write_part(copy: list[Snapshot], folder: Path) -> dict[str, Written]:
    """Writes a rank's part and lets its copy go."""
    path = write_fragments(copy.pop(), folder / layout.OPTIMIZER)
    return layout.written(folder, [str(path.relative_to(folder))])


def point_latest_at(checkpoint: Path) -> None:
    """Makes ``latest`` name it."""
    write_atomically(checkpoint.parent / layout.LATEST, checkpoint.name + "\n")


def quarantine(checkpoint: Path) -> Path:
    """Renames a checkpoint so that it counts no more, and returns its new place."""
    names = (f"set-aside-{checkpoint.name}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    place = next(place for name in names if not (place := checkpoint.with_name(name)).exists())
    return checkpoint.rename(place)
