"""Writes the metrics of a run to ``metrics.jsonl``, TensorBoard and the terminal, all from rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dcscale.observe.console import Console
from dcscale.observe.metrics import TENSORBOARD_CHARTS, MetricsFile, Record, tensorboard_scalars


class TensorBoardWriter:
    """TensorBoard event files of a run.

    Args:
        folder: the folder of the event files.
        last_step: the step that the run resumes from. TensorBoard hides points of later steps, written by an earlier
            start that was interrupted, so that curves do not overlap.
        charts: charts with several curves: group -> title -> patterns of tags.
    """

    def __init__(self, folder: Path, last_step: int, charts: Mapping[str, Mapping[str, list[str]]]):
        from torch.utils.tensorboard import SummaryWriter  # here, since it imports boto3 and more: 0.2 s

        self._writer = SummaryWriter(str(folder), purge_step=last_step + 1, flush_secs=10)
        self._writer.add_custom_scalars(
            {group: {title: ["Multiline", tags] for title, tags in titles.items()} for group, titles in charts.items()}
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def text(self, tag: str, markdown: str, step: int) -> None:
        self._writer.add_text(tag, markdown, step)

    def close(self) -> None:
        self._writer.close()


class Reporter:
    """Writes records on rank 0; does nothing on other ranks.

    Args:
        run: the run folder.
        last_step: the step that the run resumes from; what an earlier start wrote for later steps is dropped.
        steps: number of steps of the complete run.
        console: prints warnings, validation losses and progress.
        progress: whether to show progress.
        is_main: whether this is rank 0.

    Raises:
        ValueError: see :class:`MetricsFile`.
    """

    def __init__(self, run: Path, last_step: int, steps: int, console: Console, progress: bool, is_main: bool):
        self._console = console
        self._metrics = MetricsFile(run / "metrics.jsonl", last_step) if is_main else None
        self._tensorboard = TensorBoardWriter(run / "tensorboard", last_step, TENSORBOARD_CHARTS) if is_main else None
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

    def warn(self, text: str) -> None:
        self._console.line(f"warning    {text}")

    def text(self, tag: str, markdown: str, step: int) -> None:
        if self._tensorboard is not None:
            self._tensorboard.text(tag, markdown, step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None and self._tensorboard is not None:
            self._metrics.close()
            self._tensorboard.close()
