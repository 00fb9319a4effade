"""Where the numbers of a run go: ``metrics.jsonl``, TensorBoard and the terminal, all from rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from dcscale.observe.console import Console
from dcscale.observe.metrics import BOARD_CHARTS, MetricsFile, Record, board_values


class Board:
    """TensorBoard event files of a run.

    Args:
        folder: where the event files lie.
        last_step: the step that the run goes on after; points that an earlier, interrupted start of
            the run made beyond it are hidden by TensorBoard, so that curves do not overlap.
        charts: charts of several curves, by group and title, as patterns of tags.
    """

    def __init__(self, folder: Path, last_step: int, charts: Mapping[str, Mapping[str, list[str]]]):
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
    """Writes records on the main rank and nothing elsewhere.

    Args:
        run: the run's folder.
        last_step: the step the run goes on after; what an earlier start wrote beyond it disappears.
        steps: steps of the whole run.
        progress: whether to show a bar.
    """

    def __init__(self, run: Path, last_step: int, steps: int, console: Console, progress: bool, is_main: bool):
        self._console = console
        self._metrics = MetricsFile(run / "metrics.jsonl", last_step) if is_main else None
        self._board = Board(run / "tensorboard", last_step, BOARD_CHARTS) if is_main else None
        self._progress = console.progress(steps, last_step, "step") if progress else None

    def record(self, record: Record) -> None:
        if self._metrics is not None and self._board is not None:
            self._metrics.write(record)
            self._board.scalars(board_values(record), int(record["step"]))
        if "validation_loss" in record:
            bits = f", {record['bits_per_byte']:.4f} bits/byte" if "bits_per_byte" in record else ""
            self._console.line(
                f"step {record['step']}: validation loss {record['validation_loss']:.4f} nats/token{bits}"
            )
        elif "loss" in record and self._progress is not None:
            facts = {"loss": f"{record['loss']:.4f}", "tok/s": f"{record['tokens_per_second']:,.0f}"}
            if record.get("mfu") is not None:
                facts["mfu"] = f"{record['mfu']:.1%}"
            self._progress.show(int(record["step"]), facts)

    def warn(self, text: str) -> None:
        self._console.line(f"warning    {text}")

    def text(self, tag: str, markdown: str, step: int) -> None:
        if self._board is not None:
            self._board.text(tag, markdown, step)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
        if self._metrics is not None and self._board is not None:
            self._metrics.close()
            self._board.close()
