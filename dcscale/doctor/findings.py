"""What a check of the doctor has found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Verdict(StrEnum):
    """Of a finding."""

    GOOD = "good"
    BAD = "bad"
    """A run would fail, be slow or be wrong: the doctor ends with exit code 1."""

    UNKNOWN = "unknown"
    """Could not be checked here, such as GPUs where there are none; the value says why."""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's table."""

    check: str
    """Name of the check, such as ``disk space``."""

    verdict: Verdict
    node: str
    """Host name."""

    value: str
    """What was found, with its unit."""

    rule: str
    """What is expected."""

    way_out: str = ""
    """What to do about it; of bad findings only."""

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return asdict(self)
