"""Reads the files of a run folder, which anybody may have written, and which may just be written to.

What cannot be read becomes a line of ``problems``, never an error. Files grow to gigabytes: only their ends are read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from dcscale.files import parse_json
from dcscale.observe.events import event_path

CHECKPOINTS, MARKER = "checkpoints", "COMPLETE"
CHECKPOINT_NAME = re.compile(r"step-(\d{8,})")
"""Of ``dcscale.checkpoint.layout``, which imports torch."""

_SETTING = re.compile(r"(?P<indent>(?:  )?)(?P<name>\w+):(?: (?P<value>.*))?")

CODE = "code"
"""The folder of ``dcscale.cluster.job.submission`` with the code and configs of a job; that imports torch."""

MOST_RECORDS = 400
"""Records that are read, the last ones."""

MOST_STEPS = 400
"""``steps`` events that are read, the last ones. Most events are such."""

MOST_BYTES = 1 << 20
"""Largest size of a config or JSON file, and of the part of ``metrics.jsonl`` that is read. Event files have 2 MiB."""


class RunFiles:
    """The files of one run folder.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path):
        self.run = run
        self.problems: list[str] = []
        """What could not be read, and why; one line each."""

    def json(self, name: str) -> dict[str, Any]:
        """The JSON object in a file; empty if there is no such file, or it cannot be read."""
        content = self._content(self.run / name)
        if content is not None:
            try:
                value = parse_json(content, self.run / name)
                if isinstance(value, dict):
                    return value
                self.problems.append(f"{self.run / name} must be a JSON object, but is a {type(value).__name__}")
            except ValueError as error:
                self.problems.append(str(error))
        return {}

    def config(self) -> dict[str, str]:
        """The settings of the last start, see :meth:`settings`; before the first one those that were submitted."""
        submitted = [self.run / CODE / "config.yaml"]
        if (task := re.match(r"\d+", self.run.name)) is not None:
            submitted.append(self.run.parent / CODE / f"config-{task[0]}.yaml")
        return next((found for path in (self.run / "config.yaml", *submitted) if (found := self.settings(path))), {})

    def settings(self, path: Path) -> dict[str, str]:
        """The settings of sections in a YAML file as texts, by path, such as ``train.steps``. Empty without a file.

        Reads lines as ``dcscale.config.to_yaml`` writes them, of any version: that also takes 1 ms instead of 300, and
        PyYAML takes minutes for some files that are malformed.
        """
        content = self._content(path)
        if content is None:
            return {}
        found, section = {}, ""
        for line in content.decode("utf-8", "replace").split("\n"):
            if (match := _SETTING.fullmatch(line)) is None:
                continue
            if not match["indent"]:
                section = match["name"]
            elif section:
                found[f"{section}.{match['name']}"] = (match["value"] or "").strip("'\"")
        if count(found.get("train.steps")) is None:
            self.problems.append(f"{path} has no train.steps: is it the config of a run, as the run has written it?")
        return found

    def records(self) -> list[dict[str, Any]]:
        """The last records of ``metrics.jsonl``, one a step, in order: several lines of a step are merged."""
        by_step: dict[int, dict[str, Any]] = {}
        path = self.run / "metrics.jsonl"
        found = list(self._values(path, "step", int, MOST_BYTES, MOST_RECORDS))
        for record in reversed(found):
            by_step.setdefault(record["step"], {}).update(record)
        return list(by_step.values())

    def last_validation(self, most_bytes: int = 16 << 20) -> dict[str, Any]:
        """The last record with a validation loss among the last ``most_bytes``; empty if there is none."""
        path = self.run / "metrics.jsonl"
        try:
            for line in lines_backwards(path, most_bytes):
                if b'"validation_loss"' in line:
                    value = _parsed(line, "step", int)
                    if isinstance(value, dict):
                        return value
        except OSError:
            pass  # records() has said so
        return {}

    def events(self, rank: int = 0, most_steps: int = MOST_STEPS) -> list[dict[str, Any]]:
        """The events of a rank in order; of those of the kind ``steps`` only the last ``most_steps``."""
        path, steps = event_path(self.run, rank), b'{"event": "steps",'
        found = self._values(path, "event", str, 4 * MOST_BYTES, skip=steps, most_skipped=most_steps)
        return list(found)[::-1]

    def newest_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the newest checkpoint that has its marker."""
        found = []
        for name in self.names(CHECKPOINTS):
            match = CHECKPOINT_NAME.fullmatch(name)
            if match is not None and len(match[1]) < 20:
                found.append((int(match[1]), self.run / CHECKPOINTS / name))
        newest_first = sorted(found, reverse=True)
        return next((entry for entry in newest_first if self.modified(entry[1] / MARKER) is not None), None)

    def names(self, folder: str) -> list[str]:
        """The names in a folder of the run, sorted; empty if there is no such folder."""
        try:
            return sorted(os.listdir(self.run / folder))
        except FileNotFoundError:
            return []
        except OSError as error:
            self.problems.append(f"{self.run / folder} cannot be listed: {error.strerror}")
            return []

    def modified(self, path: Path) -> float | None:
        """When a file was last written to, in seconds since 1970 by the clock of its disk; None if it is not known."""
        try:
            return path.stat().st_mtime
        except OSError:
            return None

    # -- reading ------------------------------------------------------------------------------------------------------

    def _content(self, path: Path) -> bytes | None:
        """The content of a small file; None if there is no such file, or it cannot be read."""
        try:
            with open_file(path) as file:
                content = file.read(MOST_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problems.append(f"{path} cannot be read: {error.strerror or error}")
            return None
        if len(content) > MOST_BYTES:
            self.problems.append(f"{path} cannot be read: it has more than {MOST_BYTES:,} bytes")
            return None
        return content

    def _values(
        self,
        path: Path,
        key: str,
        kind: type,
        most_bytes: int,
        most: int | None = None,
        skip: bytes | None = None,
        most_skipped: int = 0,
    ) -> Iterator[dict[str, Any]]:
        """The objects in a file of JSON lines that have a ``key`` of type ``kind``, last first.

        Args:
            most_bytes: the part of the file that is read.
            most: lines that are read at most.
            skip: how lines begin of which only the last ``most_skipped`` are read.
        """
        bad, reason, skipped = 0, "", 0
        try:
            for line in islice(lines_backwards(path, most_bytes), most):
                if skip is not None and line.startswith(skip):
                    skipped += 1
                    if skipped > most_skipped:
                        continue
                value = _parsed(line, key, kind)
                if isinstance(value, str):
                    bad, reason = bad + 1, value
                else:
                    yield value
        except FileNotFoundError:
            return
        except OSError as error:
            self.problems.append(f"{path} cannot be read: {error.strerror or error}")
        if bad:
            lines = "a line is" if bad == 1 else f"{bad} lines are"
            self.problems.append(f"{path}: {lines} left out: {reason}")


def _parsed(line: bytes, key: str, kind: type) -> dict[str, Any] | str:
    """The object in a line; or why it is none."""
    try:
        value = parse_json(line, "the line")
    except ValueError as error:
        return str(error)
    if not isinstance(value, dict) or type(value.get(key)) is not kind:
        return f"it has no {'integer' if kind is int else 'string'} {key!r}"
    return value


def open_file(path: Path) -> BinaryIO:
    """Opens a file for reading; not a pipe, which would wait for a writer.

    Raises:
        OSError: it cannot be opened, or is not a file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def lines_backwards(path: Path, most_bytes: int, block: int = 1 << 18) -> Iterator[bytes]:
    """The lines among the last ``most_bytes`` of a file, last first, without their newlines.

    What follows the last newline is not complete yet, and is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with open_file(path) as file:
        end = file.seek(0, os.SEEK_END)
        first = max(0, end - most_bytes)
        rest, complete = b"", False  # of a line whose beginning is not read yet
        while end > first:
            start = max(first, end - block)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            if not complete and len(lines) > 1:
                lines.pop()
                complete = True
            rest = lines[0] if complete else b""
            yield from reversed(lines[1:])
            end = start
        if complete and first == 0:
            yield rest


# -- values, which may be of any type ---------------------------------------------------------------------------------


def number(value: Any) -> float | None:
    """A number that can be added and multiplied without an overflow; None for anything else."""
    return float(value) if type(value) in (int, float) and abs(value) < 1e18 else None


def count(value: Any) -> int | None:
    """A number of things; None for anything else. Also of a text, as settings are."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < 20:
        value = int(value)
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def text(value: Any) -> str | None:
    """A text; None for anything else."""
    return value if isinstance(value, str) else None


def timestamp(value: Any) -> float | None:
    """Seconds since 1970 of a time in ISO 8601; without a zone it is UTC. None for anything else."""
    try:
        time = datetime.fromisoformat(value.removesuffix(" UTC"))
    except (AttributeError, ValueError):
        return None
    seconds = (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()
    return seconds if 0 <= seconds < 1e11 else None
