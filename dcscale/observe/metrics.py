"""The metrics of a run: their names in ``metrics.jsonl``, units, meaning and place in TensorBoard.

``metrics.jsonl``: one JSON object a logged step, in order, without repeats after a resume.

The keys are those of :data:`dcscale.train.metrics.METRICS`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dcscale.files import write_atomically

Record = dict[str, "float | int | None"]
"""Values of one logged step, by the names in :data:`METRICS`."""


class Metric(NamedTuple):
    unit: str
    meaning: str
    board: str | None
    """Tag in TensorBoard; None keeps it out."""


DATA_EPOCH = "data_epoch"

METRICS: dict[str, Metric] = {
    "step": Metric("steps", "optimizer steps done", None),
    "tokens": Metric("tokens", "tokens read in training so far, over all ranks", "progress/tokens"),
    DATA_EPOCH: Metric("epochs", "how often the training data have been used, over all ranks", "progress/data_epoch"),
    "skipped_shards": Metric("shards", "training shards given up so far (data.on_error=skip)", "data/skipped_shards"),
    "skipped_tokens": Metric("tokens", "tokens in these shards, which every epoch lacks", "data/skipped_tokens"),
    "loss": Metric("nats/token", "training loss, mean over the targets since the last record", "loss/train"),
    "grad_norm": Metric("1", "global L2 norm of the gradient before clipping, of this step", "optimizer/grad_norm"),
    "lr": Metric("1", "peak-scaled learning rate of this step, before lr_scale of rules", "optimizer/learning_rate"),
    "tokens_per_second": Metric("tokens/s", "over all ranks, since the last record", "speed/tokens_per_second"),
    "tflops_per_device": Metric(
        "TFLOP/s", "model FLOPs a second and device, compose terms included", "speed/tflops_per_device"
    ),
    "mfu": Metric("1", "tflops_per_device / peak TFLOP/s of a device; recomputation is not counted", "speed/mfu"),
    "step_seconds": Metric("s", "mean wall-clock time of a step since the last record", "speed/step_seconds"),
    "data_wait": Metric("1", "part of that time rank 0 waited for data", "speed/data_wait"),
    "memory_gib": Metric("GiB", "peak memory of rank 0: allocated on its GPU, or resident on a CPU", "memory/peak_gib"),
    "checkpoint_stall_seconds": Metric(
        "s",
        "how long checkpoints held training up since the last record, on rank 0, if they did",
        "checkpoint/stall_seconds",
    ),
    "checkpoint_write_seconds": Metric(
        "s",
        "from the copy of the state to the whole checkpoint; of one written since the last record",
        "checkpoint/write_seconds",
    ),
    "checkpoint_bytes": Metric("bytes", "size of that checkpoint", None),
    "checkpoint_failures": Metric(
        "checkpoints", "not written since this start (checkpoint.on_error=warn)", "checkpoint/failures"
    ),
    "validation_loss": Metric("nats/token", "mean over the targets of the held-out sequences", "loss/validation"),
    "bits_per_byte": Metric(
        "bits/byte", "validation_loss / ln 2 / bytes of text a target stands for", "loss/bits_per_byte"
    ),
}
"""Every metric but those of which there are several.

``data_epoch/NAME`` takes the place of ``data_epoch`` where sources are mixed, for each source; in TensorBoard under
``progress/`` too. ``compose/pre/layer_00`` and the like, one a layer and side, are the root mean square over tokens of
||M - I||_F / sqrt(H) for the composing matrix M of a token with itself: 0 where heads are not mixed at all. In
TensorBoard they follow the others, under ``weights/``."""

COMPOSE_PREFIX = "compose/"

BOARD_CHARTS = {
    "loss": {"training and validation": [METRICS["loss"].board, METRICS["validation_loss"].board]},
    "compose": {side: [f"weights/{COMPOSE_PREFIX}{side}/.*"] for side in ("pre", "post")},
}
"""Charts of several curves for TensorBoard's custom scalars: by group and title, patterns of tags."""


def board_values(record: Mapping[str, float | int | None]) -> dict[str, float]:
    """The part of a record that TensorBoard shows, by tag."""
    values = {}
    for name, value in record.items():
        if name.startswith(COMPOSE_PREFIX):
            tag: str | None = f"weights/{name}"
        elif name.startswith(f"{DATA_EPOCH}/"):
            tag = f"progress/{name}"
        else:
            tag = METRICS[name].board
        if tag is not None and value is not None:
            values[tag] = value
    return values


class MetricsFile:
    """Appends records to a file; opening it for a run that goes on after ``last_step`` drops what lies beyond.

    Records of one step are merged when read by :func:`read_metrics`: validation comes as its own line.

    Raises:
        ValueError: what is there are no metrics of a run; it is left as it is.
    """

    def __init__(self, path: Path, last_step: int):
        kept = []
        if path.exists():
            # A line cut off by a crash is dropped with everything after it.
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:
                    break
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError(f"{path}, line {number}: is no record of a run, as it has no step")
                if record["step"] > last_step:
                    break
                kept.append(line + "\n")
        write_atomically(path, "".join(kept))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, float | int | None]) -> None:
        """Appends one object and hands it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file, those of one step merged into one."""
    by_step: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = json.loads(line)
            by_step.setdefault(record["step"], {}).update(record)
    return list(by_step.values())
