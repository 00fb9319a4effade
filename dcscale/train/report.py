"""Where the numbers of a run go: ``metrics.jsonl``, TensorBoard and the terminal, all from rank 0."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dcscale.config import Config
from dcscale.data.sources import shown
from dcscale.observe import Console, MetricsFile
from dcscale.observe.board import Board
from dcscale.train.hooks.base import Record
from dcscale.train.metrics import BOARD_CHARTS, board_values


def without_secrets(config: Config) -> Config:
    """The config as it is written down: without the credentials that addresses of data may hold."""
    data = config.data
    sources = [dataclasses.replace(source, path=shown(source.path)) for source in data.sources]
    validation = None if data.validation is None else shown(data.validation)
    data = dataclasses.replace(data, train=shown(data.train), sources=sources, validation=validation)
    return dataclasses.replace(config, data=data)


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
