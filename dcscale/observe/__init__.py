"""How a run is seen: terminal, metrics file, TensorBoard; and files that are never half-written."""

from dcscale.observe.console import Console, Progress
from dcscale.observe.files import sync_folder, write_atomically, write_json
from dcscale.observe.metrics_file import MetricsFile, read_metrics

__all__ = [
    "Console",
    "MetricsFile",
    "Progress",
    "read_metrics",
    "sync_folder",
    "write_atomically",
    "write_json",
]
