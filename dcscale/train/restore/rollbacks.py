"""Which sequences a run passes over after a checkpoint that it went back to: ``RUN/rollbacks.json``.

A checkpoint does not know that the run will come back to it. So the run writes down what it passes over before it goes
on from there, and every start that resumes from this checkpoint passes over the same sequences.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcscale.checkpoint import CheckpointError
from dcscale.checkpoint.layout import MARKER
from dcscale.files import read_json, sha256_of, write_json
from dcscale.train.state import TrainState

ROLLBACKS = "rollbacks.json"
FORMAT = 1


@dataclass(frozen=True)
class Rollback:
    """A spike that the run went back from. ``rollbacks.json`` has a list of them, in order."""

    checkpoint: str
    """Name of the checkpoint that the run went back to."""

    marker_sha256: str
    """SHA-256 of the checkpoint's marker, which tells it from another one of this name."""

    step: int
    """The step that was a spike."""

    reason: str
    """What the spike was."""

    first: int
    """Number of the first sequence that is passed over."""

    end: int
    """Number after the last sequence that is passed over: the last one of the spike."""

    skipped: list[dict[str, Any]]
    """Shards that had been skipped until the spike (``data.on_error=skip``), and stay so."""

    @classmethod
    def of(cls, checkpoint: Path, restored: TrainState, current: TrainState, batch: int, reason: str) -> Rollback:
        """The rollback from a spike in the step after ``current`` to ``checkpoint``, whose state is ``restored``."""
        end = current.sequences + batch
        marker = sha256_of(checkpoint / MARKER)
        return cls(checkpoint.name, marker, current.step + 1, reason, restored.sequences, end, current.skipped)

    def apply(self, state: TrainState) -> None:
        """Makes the state of the checkpoint that of the run after the rollback."""
        state.sequences, state.skipped = self.end, self.skipped
        state.passed_over.append({"step": self.step, "reason": self.reason, "first": self.first, "end": self.end})


def rollbacks_to(run: Path, checkpoint: Path) -> list[Rollback]:
    """The rollbacks of a run to a checkpoint so far, in order.

    Raises:
        CheckpointError: the run's ``rollbacks.json`` cannot be used.
    """
    recorded = _read(run / ROLLBACKS)
    if not recorded:
        return []
    marker = sha256_of(checkpoint / MARKER)
    return [rollback for rollback in recorded if rollback.marker_sha256 == marker]


def record_rollback(run: Path, rollback: Rollback) -> None:
    """Adds a rollback to those of the run; on return it is on the disk.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = run / ROLLBACKS
    content = [dataclasses.asdict(known) for known in (*_read(path), rollback)]
    try:
        write_json(path, {"format": FORMAT, "rollbacks": content})
    except OSError as error:
        raise CheckpointError(f"{path} cannot be written: {error.strerror or error}") from error


def _read(path: Path) -> list[Rollback]:
    if not path.exists():
        return []
    content = read_json(path, CheckpointError)
    entries = content.get("rollbacks")
    if content.get("format") != FORMAT or not isinstance(entries, list):
        raise _unusable(path, f"has the format {content.get('format')!r} and rollbacks {type(entries).__name__}")
    return [_parse(path, entry) for entry in entries]


def _parse(path: Path, entry: Any) -> Rollback:
    types = {"checkpoint": str, "marker_sha256": str, "step": int, "reason": str, "first": int, "end": int}
    types["skipped"] = list
    if not isinstance(entry, dict) or entry.keys() != types.keys():
        raise _unusable(path, f"has an entry that is not of the form {', '.join(types)}")
    for name, kind in types.items():
        if type(entry[name]) is not kind:
            raise _unusable(path, f"has an entry with {name} = {entry[name]!r}, which must be {kind.__name__}")
    if not 0 <= entry["first"] < entry["end"]:
        raise _unusable(path, f"passes over sequences {entry['first']} up to {entry['end']}")
    return Rollback(**entry)


def _unusable(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {problem}, but dcscale has not written that: restore it from a copy, or remove it to train on the "
        "sequences that the run had passed over"
    )
