"""``metrics.jsonl``: one JSON object a logged step, in order, without repeats after a resume.

The keys are those of :data:`dcscale.train.metrics.METRICS`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from dcscale.files import write_atomically


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
