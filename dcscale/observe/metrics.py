"""The metrics of a run: their names in ``metrics.jsonl``, units, meanings and TensorBoard tags.

``metrics.jsonl`` has one JSON object per logged step, in order of steps and without repetitions after a resume. Its
keys are those of :data:`METRICS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from dcscale.files import parse_json, write_atomically
from dcscale.observe.json_lines import JsonLines

Record = dict[str, "float | int | None"]
"""Values of one logged step, by metric name (:data:`METRICS`)."""


class Metric(NamedTuple):
    unit: str
    meaning: str
    tag: str | None
    """Tag in TensorBoard; None: not shown there."""


DATA_EPOCH = "data_epoch"

METRICS: dict[str, Metric] = {
    "step": Metric("steps", "optimizer steps done", None),
    "tokens": Metric(
        "tokens",
        "tokens trained on so far, over all ranks, without padding and steps without an update",
        "progress/tokens",
    ),
    "padding_tokens": Metric(
        "tokens", "inputs so far that were padding, over all ranks; absent if 0", "data/padding_tokens"
    ),
    "steps_without_targets": Metric(
        "steps",
        "steps so far that had no target, and so no loss and no update; absent if 0",
        "data/steps_without_targets",
    ),
    "skipped_updates": Metric(
        "steps",
        "steps so far whose update was skipped (train.on_nonfinite, train.on_spike); absent if 0",
        "optimizer/skipped_updates",
    ),
    "spikes": Metric(
        "steps",
        "steps so far whose loss or gradient norm was a spike, but for those before a rollback; absent if 0",
        "optimizer/spikes",
    ),
    "rollbacks": Metric(
        "rollbacks",
        "spikes from which the run went back to a checkpoint (train.on_spike=rollback); absent if 0",
        "optimizer/rollbacks",
    ),
    "passed_over_sequences": Metric(
        "sequences", "sequences that were passed over in rollbacks so far; absent if 0", "data/passed_over_sequences"
    ),
    DATA_EPOCH: Metric(
        "epochs",
        "epochs of the training data so far, over all ranks, sequences that were passed over included",
        "progress/data_epoch",
    ),
    "skipped_shards": Metric("shards", "training shards skipped so far (data.on_error=skip)", "data/skipped_shards"),
    "skipped_tokens": Metric("tokens", "tokens of these shards, missing from every epoch", "data/skipped_tokens"),
    "loss": Metric(
        "nats/token",
        "training loss, mean over the target tokens since the last record; null if there was none",
        "loss/train",
    ),
    "grad_norm": Metric(
        "1",
        "global L2 norm of the gradient of this step, before clipping; null without targets and if not finite",
        "optimizer/grad_norm",
    ),
    "spike_score": Metric(
        "1",
        "how far the loss or gradient norm of this step, whichever is further, is above the last 128 steps, in robust "
        "standard deviations; more than train.spike_score is a spike",
        "optimizer/spike_score",
    ),
    "lr": Metric("1", "learning rate of this step, before lr_scale of optimizer.rules", "optimizer/learning_rate"),
    "tokens_per_second": Metric(
        "tokens/s", "tokens trained on since the last record, over all ranks", "speed/tokens_per_second"
    ),
    "tflops_per_device": Metric(
        "TFLOP/s",
        "model FLOP/s per device: tokens_per_second * FLOPs of a token of a full sequence, compose terms included",
        "speed/tflops_per_device",
    ),
    "mfu": Metric(
        "1", "tflops_per_device / peak TFLOP/s of the device; recomputation and padding are not counted", "speed/mfu"
    ),
    "step_seconds": Metric("s", "mean wall-clock time of a step since the last record", "speed/step_seconds"),
    "data_wait": Metric("1", "fraction of step_seconds that rank 0 waited for data", "speed/data_wait"),
    "slowest_rank": Metric(
        "rank",
        "the rank that takes longest for a step, not counting its waiting for others, over the last 40 steps; absent "
        "before them, and with one rank",
        "speed/slowest_rank",
    ),
    "slowest_over_median": Metric(
        "1", "time that this rank takes for a step / median of the other ranks", "speed/slowest_over_median"
    ),
    "memory_gib": Metric("GiB", "peak memory of rank 0: allocated on a GPU, or resident on a CPU", "memory/peak_gib"),
    "checkpoint_stall_seconds": Metric(
        "s",
        "time that checkpoints blocked training since the last record, on rank 0; absent if 0",
        "checkpoint/stall_seconds",
    ),
    "checkpoint_write_seconds": Metric(
        "s",
        "time from copying the state to the complete checkpoint; absent if none was written since the last record",
        "checkpoint/write_seconds",
    ),
    "checkpoint_bytes": Metric("bytes", "size of that checkpoint", None),
    "checkpoint_failures": Metric(
        "checkpoints",
        "checkpoints that could not be written since this start (checkpoint.on_error=warn)",
        "checkpoint/failures",
    ),
    "validation_loss": Metric("nats/token", "validation loss, mean over the target tokens", "loss/validation"),
    "bits_per_byte": Metric(
        "bits/byte", "validation_loss / ln 2 / mean bytes of text per target token", "loss/bits_per_byte"
    ),
}
"""All metrics with fixed names. Two families have names that depend on the config:

``data_epoch/NAME`` replaces ``data_epoch`` for a mixture, one per source; tag ``progress/data_epoch/NAME``.

``compose/pre/layer_00`` etc., one per layer and side (``pre``, ``post``): distance of the composition from identity,
the root mean square over tokens of ||M - I||_F / sqrt(H), where M is the H x H composition matrix of a token with
itself; 0 if heads are not mixed. Tag ``weights/compose/pre/layer_00``."""

COMPOSE_PREFIX = "compose/"

TENSORBOARD_CHARTS = {
    "loss": {"training and validation": [METRICS["loss"].tag, METRICS["validation_loss"].tag]},
    "compose": {side: [f"weights/{COMPOSE_PREFIX}{side}/.*"] for side in ("pre", "post")},
}
"""Charts with several curves for TensorBoard's custom scalars: group -> title -> patterns of tags."""


def tensorboard_scalars(record: Mapping[str, float | int | None]) -> dict[str, float]:
    """The values of a record that TensorBoard shows, by tag."""
    values = {}
    for name, value in record.items():
        if name.startswith(COMPOSE_PREFIX):
            tag: str | None = f"weights/{name}"
        elif name.startswith(f"{DATA_EPOCH}/"):
            tag = f"progress/{name}"
        else:
            tag = METRICS[name].tag
        if tag is not None and value is not None:
            values[tag] = value
    return values


def metrics_table() -> str:
    """All metrics as a Markdown table, for the README of ``dcscale.train``."""
    rows = [f"| `{name}` | {m.unit} | {m.meaning} | {m.tag or ''} |" for name, m in METRICS.items()]
    return "\n".join(["| key | unit | meaning | TensorBoard |", "|---|---|---|---|", *rows])


class MetricsFile:
    """Appends records to ``metrics.jsonl``. A step may have several lines, which :func:`read_metrics` merges.

    A disk that fails does not stop training: see :class:`JsonLines`.

    Args:
        path: the file; created if missing.
        last_step: the step that the run resumes from; records of later steps are removed.
        warn: prints a warning.
        check: called before the file is replaced or opened; raises if it is no longer this process's to write.

    Raises:
        ValueError: the file has lines that are not records of a run; it is left unchanged.
        OSError: it cannot be written.
    """

    def __init__(
        self, path: Path, last_step: int, warn: Callable[[str], None], check: Callable[[], None] = lambda: None
    ):
        check()
        # A new file: a start that has lost the run folder, but does not know it yet, keeps writing to its own.
        write_atomically(path, "".join(lines_until(path, last_step)))
        self._lines = JsonLines(path, warn, before_opening=check)

    def write(self, record: Mapping[str, float | int | None]) -> None:
        """Appends one record and gives it to the operating system."""
        self._lines.write(record)

    def close(self) -> None:
        """Makes the file durable."""
        self._lines.close()


def lines_until(path: Path, last_step: int) -> list[str]:
    """The lines of a metrics file, which may be missing, with records up to ``last_step``.

    Raises:
        ValueError: the file has lines that are not records of a run.
    """
    kept: list[str] = []
    if not path.exists():
        return kept
    # A crash may have truncated a line: drop it and everything after it.
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        try:
            record = parse_json(line, path)
        except ValueError:
            break
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}, line {number}: is not a record of a run: it has no integer 'step'")
        if record["step"] > last_step:
            break
        kept.append(line + "\n")
    return kept


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file, one per step: several lines of a step are merged."""
    by_step: dict[int, dict[str, float]] = {}
    with path.open(encoding="utf-8") as file:
        for line in file:
            record = parse_json(line, path)
            by_step.setdefault(record["step"], {}).update(record)
    return list(by_step.values())
