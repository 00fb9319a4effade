"""Terminal output: lines and a progress bar, from rank 0 only."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def printable(text: str) -> str:
    """Escapes all control characters except newline and tab, so that ``text`` cannot control the terminal."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


class Console:
    """Prints lines and progress if ``enabled``, which it is on rank 0 only."""

    def __init__(self, enabled: bool = True):
        self._enabled = enabled

    def line(self, text: str = "") -> None:
        """Prints a line to stdout."""
        if self._enabled:
            # tqdm.write prints the line above a visible progress bar.
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, total: int, done: int, unit: str) -> Progress:
        """Starts a progress display at ``done`` of ``total`` units."""
        return Progress(total, done, unit, self._enabled)


class Progress:
    """A progress bar on a terminal (stderr); elsewhere a line every ``SECONDS_BETWEEN_LINES`` with the same values.

    Args:
        total: number of units of the complete work.
        done: units that are done at the start.
        unit: name of the unit, such as ``step``.
        enabled: whether to show anything.
        file: where the lines go; None: stdout.
    """

    def __init__(self, total: int, done: int, unit: str, enabled: bool = True, file: TextIO | None = None):
        self._bar: tqdm | None = None
        self._file = file
        self._enabled, self._total, self._unit = enabled, total, unit
        self._start, self._start_done, self._last_line = time.monotonic(), done, 0.0
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, smoothing=0.05)

    def show(self, done: int, values: Mapping[str, str]) -> None:
        """Moves the bar to ``done`` units and shows the values next to it."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._enabled:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES or done >= self._total:
                self._last_line = now
                rate = (done - self._start_done) / max(now - self._start, 1e-9)
                left = tqdm.format_interval((self._total - done) / rate) if rate > 0 else "?"
                text = " | ".join(f"{name} {value}" for name, value in values.items())
                print(f"{self._unit} {done}/{self._total} | {text} | {left} left", file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
