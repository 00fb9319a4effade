"""Reporting of a run: terminal, metrics file, TensorBoard."""

from dcscale.observe.console import Console, Progress, printable
from dcscale.observe.metrics import MetricsFile, read_metrics

__all__ = [
    "Console",
    "MetricsFile",
    "Progress",
    "printable",
    "read_metrics",
]
