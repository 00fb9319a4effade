"""What a field allows, declared at the field: a range of numbers, one of a few choices, or a path."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Range:
    """An interval; open ends are excluded."""

    low: float
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.open_low else 'at least'} {self.low}"
        return f"in {'(' if self.open_low else '['}{self.low}, {self.high}{')' if self.open_high else ']'}"


COUNT, NOT_NEGATIVE, POSITIVE = Range(1), Range(0), Range(0, open_low=True)


def number(default: Any, allowed: Range) -> Any:
    """Field for a number, or a list of numbers, within ``allowed``. None is allowed if the field's type allows it."""
    metadata = {"range": allowed}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def location(default: str | None) -> Any:
    """Field for a path or an address. In a path, ``load`` expands ``~`` at the beginning and ``$NAME``."""
    return field(default=default, metadata={"is_path": True})


def choice(*options: Any, default: Any = None) -> Any:
    """Field for one of ``options``; the default is the first one unless given."""
    return field(default=options[0] if default is None else default, metadata={"choices": options})
