"""Writes the metrics of a run to ``metrics.jsonl``, TensorBoard and the terminal, all from rank 0."""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dcscale.observe.console import Console
from dcscale.observe.json_lines import AppendedFile
from dcscale.observe.metrics import TENSORBOARD_CHARTS, MetricsFile, Record, tensorboard_scalars


class TensorBoardWriter:
    """Writes a TensorBoard event file. A disk that fails does not stop training: see :class:`AppendedFile`.

    SummaryWriter is not used, because its thread dies of the first error of the disk, with what it has not written.

    Args:
        folder: the folder of the event files.
        last_step: the step that the run resumes from, see :meth:`drop_after`.
        charts: charts with several curves: group -> title -> patterns of tags.
        warn: prints a warning.

    Raises:
        OSError: the folder cannot be created.
    """

    def __init__(
        self,
        folder: Path,
        last_step: int,
        charts: Mapping[str, Mapping[str, list[str]]],
        warn: Callable[[str], None],
    ):
        # Here, since they import boto3 and more: 0.2 s.
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._proto, self._summary, self._record_writer = event_pb2, summary, RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}"
        paths = (folder / f"{name}.{number}" for number in itertools.count())
        self._file = AppendedFile(next(path for path in paths if not path.exists()), warn)
        self._append(event_pb2.Event(file_version="brain.Event:2"))
        self.drop_after(last_step)
        layout = {
            group: {title: ["Multiline", tags] for title, tags in titles.items()} for group, titles in charts.items()
        }
        self._append(event_pb2.Event(summary=summary.custom_scalars(layout)))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        scalar, event = self._summary.scalar, self._proto.Event
        self._append(*(event(step=step, summary=scalar(tag, value)) for tag, value in values.items()))

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._append(self._proto.Event(step=step, summary=self._summary.text(tag, markdown)))

    def drop_after(self, step: int) -> None:
        """Has TensorBoard hide the points of later steps that were written before, so that curves do not overlap."""
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._append(self._proto.Event(step=step + 1, session_log=start))

    def close(self) -> None:
        self._file.close()

    def _append(self, *events: Any) -> None:
        content = io.BytesIO()
        for event in events:
            event.wall_time = time.time()
            self._record_writer(content).write(event.SerializeToString())
        self._file.append(content.getvalue())


class Reporter:
    """Writes records on rank 0; does nothing on other ranks. A disk that fails is reported and raises nothing.

    Args:
        run: the run folder.
        last_step: the step that the run resumes from; what an earlier start wrote for later steps is dropped.
        steps: number of steps of the complete run.
        console: prints warnings, validation losses and progress.
        progress: whether to show progress.
        is_main: whether this is rank 0.
        check: see :class:`MetricsFile`.

    Raises:
        ValueError, OSError: see :class:`MetricsFile`.
    """

    def __init__(
        self,
        run: Path,
        last_step: int,
        steps: int,
        console: Console,
        progress: bool,
        is_main: bool,
        check: Callable[[], None] = lambda: None,
    ):
        self._console, self._run, self._check = console, run, check
        self._metrics = self._tensorboard = None
        if is_main:
            self._metrics = MetricsFile(run / "metrics.jsonl", last_step, self.warn, check)
            self._tensorboard = TensorBoardWriter(run / "tensorboard", last_step, TENSORBOARD_CHARTS, self.warn)
        self._progress = console.progress(steps, last_step, "step") if progress else None

    def record(self, record: Record) -> None:
        """Writes one record; shows it as validation loss or as progress on the terminal."""
        if self._metrics is not None and self._tensorboard is not None:
            self._metrics.write(record)
            self._tensorboard.scalars(tensorboard_scalars(record), int(record["step"]))
        if "validation_loss" in record:
            bits = f", {record['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in record else ""
            self._console.line(
                f"step {record['step']}: validation loss {record['validation_loss']:.4f} nats/token{bits}"
            )
        elif "loss" in record and self._progress is not None:
            loss = "none" if record["loss"] is None else f"{record['loss']:.4f}"
            values = {"loss": loss, "tok/s": f"{record['tokens_per_second']:,.0f}"}
            if record.get("mfu") is not None:
                values["mfu"] = f"{record['mfu']:.1%}"
            self._progress.show(int(record["step"]), values)

    def drop_after(self, step: int) -> None:
        """Drops what was written for later steps, as a start that resumes from ``step`` does."""
        if self._metrics is not None and self._tensorboard is not None:
            self._metrics.close()
            self._metrics = MetricsFile(self._run / "metrics.jsonl", step, self.warn, self._check)
            self._tensorboard.drop_after(step)

    def line(self, text: str) -> None:
        self._console.line(text)

    def warn(self, text: str) -> None:
        self.line(f"warning    {text}")

    def text(self, tag: str, markdown: str, step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.text(tag, markdown, step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None and self._tensorboard is not None:
            self._metrics.close()
            self._tensorboard.close()
