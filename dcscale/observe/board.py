"""The only place that knows TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


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
