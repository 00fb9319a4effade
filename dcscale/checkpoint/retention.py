"""Which checkpoints of a run are kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Collection
from pathlib import Path

from dcscale.checkpoint.contents import read_state
from dcscale.checkpoint.layout import TEMPORARY_PREFIX, checkpoints_of, defect, step_of
from dcscale.config import CheckpointConfig
from dcscale.files import sync_folder


def superfluous(run: Path, settings: CheckpointConfig, spared: Collection[Path]) -> list[Path]:
    """The whole checkpoints of a run that ``settings`` do not keep, oldest first; none of ``spared``.

    Kept are the newest ``keep_last``, those of every ``keep_every`` steps, and the ``keep_best`` of the lowest
    validation loss, the older of equal ones. A damaged checkpoint neither takes the place of a whole one nor is named.

    Raises:
        CheckpointError: a checkpoint's ``state.json`` cannot be read.
    """
    if settings.keep_last is None:
        return []
    whole = [checkpoint for checkpoint in checkpoints_of(run) if defect(checkpoint) is None]
    kept = set(whole[-settings.keep_last :])
    if settings.keep_every is not None:
        kept.update(checkpoint for checkpoint in whole if step_of(checkpoint) % settings.keep_every == 0)
    if settings.keep_best is not None:
        losses = {checkpoint: read_state(checkpoint).get("validation_loss") for checkpoint in whole}
        measured = [checkpoint for checkpoint, loss in losses.items() if loss is not None and math.isfinite(loss)]
        kept.update(sorted(measured, key=losses.__getitem__)[: settings.keep_best])
    kept_places = {checkpoint.resolve() for checkpoint in [*kept, *spared]}
    return [checkpoint for checkpoint in whole if checkpoint.resolve() not in kept_places]


def discard(checkpoint: Path) -> None:
    """Removes a checkpoint; it has lost its name before it loses its first file."""
    doomed = checkpoint.rename(checkpoint.with_name(TEMPORARY_PREFIX + checkpoint.name))
    sync_folder(checkpoint.parent)
    shutil.rmtree(doomed)
