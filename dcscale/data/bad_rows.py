"""Rows of text that cannot be used: for which reason, and how many may be left out.

A row is what holds one document: a line of JSON lines, an element of a JSON array, a row of Parquet, a text file, or
the text of a sample in a tar.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcscale.data.errors import DataError

POLICIES = ("fail", "skip")
"""What to do about a bad row: stop, or leave it out and count it."""

_HOPELESS = 10_000
"""If the first rows are all bad, so many show that no others are different, as with a wrong text field."""

_ALWAYS_ALLOWED = 100
"""Bad rows that are never too many, whatever their fraction, so that small inputs can be read."""

# Of other fields nothing is used, and Python refuses to convert integers of more than 4,300 digits to int.
JSON_DECODER = json.JSONDecoder(parse_int=float)


def check_policy(on_bad_row: str, max_bad_rows: float) -> None:
    """Raises DataError if ``on_bad_row`` is not one of ``POLICIES``, or ``max_bad_rows`` is not a fraction."""
    if on_bad_row not in POLICIES:
        raise DataError(f"on_bad_row is {on_bad_row!r}, but must be {' or '.join(POLICIES)}")
    if not 0 <= max_bad_rows <= 1:
        raise DataError(f"max_bad_rows is {max_bad_rows}, but must be a fraction from 0 to 1 of the rows")


class BadRow(ValueError):
    """A row without usable text.

    Args:
        reason: one of a few short texts, by which such rows are counted.
        problem: what is wrong with this row, for a message that begins with its place.
        fix: how to correct it.
    """

    def __init__(self, reason: str, problem: str, fix: str = "correct it") -> None:
        super().__init__(f"{problem}; {fix}")
        self.reason, self.problem, self.fix = reason, problem, fix


def decode_text(data: bytes | memoryview) -> str:
    """``data`` as strict UTF-8.

    Raises:
        BadRow: it is something else.
    """
    try:
        return str(data, "utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is {error.object[error.start]:#04x}, which is not UTF-8"
        raise BadRow("not UTF-8", problem, "convert it to UTF-8") from error


def text_of_json(data: bytes | memoryview, text_field: str) -> str:
    """The string in the field ``text_field`` of a JSON object in UTF-8; all other fields may hold anything.

    Raises:
        BadRow: there is no such string, or it cannot be encoded as UTF-8.
    """
    line = decode_text(data)
    try:
        content = JSON_DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        raise BadRow("not JSON", f"is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRow("not an object", f"is {_kind(content)}, but must be an object with the text in {text_field!r}")
    if text_field not in content:
        names = ", ".join(map(repr, content)) or "none"
        problem = f"has no field {text_field!r} (its fields: {names if len(names) <= 200 else names[:200] + '...'})"
        raise BadRow("no text field", problem, "correct it, name the right field with --text-field")
    text = content[text_field]
    if text is None:
        raise BadRow("null text", f"{text_field!r} is null")
    if not isinstance(text, str):
        raise BadRow("text is not a string", f"{text_field!r} is {_kind(text)}, but must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        problem = f"character {error.start} of {text_field!r} is half of a surrogate pair, which is not valid text"
        raise BadRow("lone surrogate", problem) from error
    return text


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", float: "a number"}
    return kinds.get(type(value), "null")


@dataclass
class SkippedRows:
    """How many rows were left out, by reason."""

    rows: int = 0
    """Rows that were read, the bad ones included."""

    by_reason: Counter[str] = field(default_factory=Counter)
    """Reason -> bad rows."""

    first: dict[str, str] = field(default_factory=dict)
    """Reason -> where its first row is."""

    def add(self, good: int, bad: Mapping[str, int], first: Mapping[str, str]) -> None:
        """Add what the next part of the data holds: good rows, bad rows by reason, and where the first of each is."""
        self.rows += good + sum(bad.values())
        self.by_reason.update(bad)
        self.first = {**first, **self.first}

    def check(self, max_bad_rows: float) -> None:
        """Check the limit on bad rows: some, or the fraction ``max_bad_rows`` of the rows that were read.

        Raises:
            DataError: there are more.
        """
        if self.by_reason.total() > max(_ALWAYS_ALLOWED, max_bad_rows * self.rows):
            raise DataError(
                f"{self}. These are more than {_ALWAYS_ALLOWED} and more than the fraction {max_bad_rows:g}; correct "
                f"the inputs, name the right field with --text-field, or allow more with --max-bad-rows"
            )

    def check_start(self, max_bad_rows: float) -> None:
        """Check the limit before all rows are read, where none at all could be used so far.

        Raises:
            DataError: all of many rows are bad.
        """
        if self.by_reason.total() == self.rows >= _HOPELESS:
            self.check(max_bad_rows)

    def __str__(self) -> str:
        reasons = (
            f"{reason} {count:,}, such as {self.first[reason]}" for reason, count in self.by_reason.most_common()
        )
        return f"{self.by_reason.total():,} of {self.rows:,} rows cannot be used: {'; '.join(reasons)}"
