"""What happened in a run, and how long its steps took on each rank: ``RUN/events/rank-N.jsonl``.

One JSON object a line, in the order in which things happened; resumes append, so steps may be there twice. Each has
``time`` (UTC, ISO 8601) and ``event``, its kind, and the facts of that kind (:data:`EVENTS`).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from dcscale.files import parse_json
from dcscale.observe.json_lines import JsonLines

EVENTS = {
    "start": "each rank: training begins or resumes. `step`, `checkpoint` that it resumes from or null, `host`, `pid`, "
    "`world_size`",
    "steps": "each rank, every `log.interval`: mean times of the last `steps` steps up to `step`, in seconds a step. "
    "`seconds`: wall-clock; `data`, `forward`, `backward`, `update`: of this rank, without `waiting` for others",
    "straggler": "a rank is slower than the others. `step`, `rank`, `host`, `excess` (its time of a step / median of "
    "the others - 1), `seconds` (its time of a step), `phase` that differs most, and `phase_seconds`, by how much",
    "recovered": "it is no longer. `step`, `rank`, `host`",
    "checkpoint": "a checkpoint is complete. `step` at which this was seen, `checkpoint`, `seconds`, `bytes`",
    "checkpoint_failure": "a checkpoint could not be written (checkpoint.on_error=warn). `step`, `error`",
    "nonfinite": "the gradient of a step is not finite. `step`, `reason`, `sequences` [first, end), `loss`, "
    "`grad_norm`, `action` (stop, skip)",
    "spike": "loss or gradient norm of a step is a spike. `step`, `reason`, `sequences` [first, end), `loss`, "
    "`grad_norm`, `action` (update, skip, roll_back)",
    "rollback": "the run goes back to `checkpoint` after the spike of `step`. `reason`, `sequences` [first, end) that "
    "are passed over",
    "rollback_failure": "the run could not go back after the spike of `step`, so its update was skipped. `error`",
    "profile": "each rank that was asked: a trace of its steps was written (`RUN/profile`, log.profile_steps). `step`, "
    "the first, `steps`, `files`, `bytes`, `seconds` that it took",
    "memory": "the same of a look at its memory (`RUN/memory`)",
    "stacks": "all ranks write their stacks (`RUN/stacks`). `step`, `folder`",
    "request_failure": "each rank: what was asked for could not be done, or not be understood. `step`, `request` "
    "(profile, memory, stacks), `error`",
    "ending": "each rank that can still write: this start ends. `code` (exit code), `reason`, `step`",
}
"""Kinds of events, and their facts. Those of no rank in particular are written by rank 0."""


def events_table() -> str:
    """All kinds of events as a Markdown table, for the README of this folder."""
    rows = [f"| `{kind}` | {meaning} |" for kind, meaning in EVENTS.items()]
    return "\n".join(["| kind | meaning and facts |", "|---|---|", *rows])


class EventFile:
    """Writes the events of one rank. A disk that fails does not stop training (:class:`JsonLines`).

    Args:
        path: the file, :func:`event_path`.
        warn: prints a warning.
        most_bytes: size of the file at which it is cut to half: the oldest ``steps`` go first, then the oldest others.
    """

    def __init__(self, path: Path, warn: Callable[[str], None], most_bytes: int = 2 << 20):
        self._path, self._warn = path, warn
        self._lines = JsonLines(path, warn)
        self._most_bytes = self._cut_at = most_bytes

    def write(self, kind: str, **facts: Any) -> None:
        """Writes an event, at once; ``facts`` are JSON values. May be called by any thread.

        Blocks as long as the disk does, but raises nothing if it fails.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        self._lines.write({"event": kind, "time": now, **facts})
        if self._lines.size > self._cut_at:
            self._cut()

    def close(self) -> None:
        """Makes the file durable."""
        self._lines.close()

    def _cut(self) -> None:
        try:
            self._lines.replace(self._newest)
            self._cut_at = self._most_bytes
        except OSError as error:  # the copy needs space of its own; not at each event again
            self._cut_at = self._lines.size + self._most_bytes // 2
            self._warn(f"{self._path} has {self._lines.size:,} bytes and cannot be cut: {error.strerror or error}")

    def _newest(self, lines: list[bytes]) -> list[bytes]:
        excess = sum(map(len, lines)) - self._most_bytes // 2
        steps = b'{"event": "steps",'
        dropped: set[int] = set()
        for number in sorted(range(len(lines)), key=lambda number: not lines[number].startswith(steps)):
            if excess <= 0:
                break
            dropped.add(number)
            excess -= len(lines[number])
        return [line for number, line in enumerate(lines) if number not in dropped]


def event_path(run: Path, rank: int) -> Path:
    """The event file of a rank."""
    return run / "events" / f"rank-{rank}.jsonl"


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in a file that may just be written to. Lines that are none become ``{"event": "unreadable", ...}``."""
    events = []
    # The last element is empty, or a line that is not complete yet.
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            event = parse_json(line, f"{path}, line {number}")
            if not isinstance(event, dict) or not isinstance(event.get("event"), str):
                raise ValueError(f"{path}, line {number}: is not an event: it has no string 'event'")
        except ValueError as error:
            event = {"event": "unreadable", "error": str(error)}
        events.append(event)
    return events
