"""What a person at the terminal sees: lines from rank 0 and a progress bar."""

from __future__ import annotations

import sys
import time
import unicodedata
from collections.abc import Mapping
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


def printable(text: str) -> str:
    """``text`` with control characters but newline and tab escaped, so that it cannot steer the terminal."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text
    )


class Console:
    """Prints on rank 0 only; every other rank is silent."""

    def __init__(self, enabled: bool = True):
        self._enabled = enabled

    def line(self, text: str = "") -> None:
        if self._enabled:
            # tqdm.write puts the line above a progress bar that is being shown.
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def progress(self, total: int, done: int, unit: str) -> Progress:
        return Progress(total, done, unit, self._enabled)


class Progress:
    """A bar on a terminal; in a log file, a line every now and then with the same facts.

    ``file`` takes the lines; None is stdout, where the bar never is.
    """

    def __init__(self, total: int, done: int, unit: str, enabled: bool = True, file: TextIO | None = None):
        self._bar: tqdm | None = None
        self._file = file
        self._enabled, self._total, self._unit = enabled, total, unit
        self._start, self._start_done, self._last_line = time.monotonic(), done, 0.0
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, unit=unit, dynamic_ncols=True, smoothing=0.05)

    def show(self, done: int, facts: Mapping[str, str]) -> None:
        """Moves the bar to ``done`` and shows the facts beside it."""
        if self._bar is not None:
            self._bar.set_postfix(facts, refresh=False)
            self._bar.update(done - self._bar.n)
        elif self._enabled:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES or done >= self._total:
                self._last_line = now
                rate = (done - self._start_done) / max(now - self._start, 1e-9)
                left = tqdm.format_interval((self._total - done) / rate) if rate > 0 else "?"
                stated = " | ".join(f"{name} {value}" for name, value in facts.items())
                print(f"{self._unit} {done}/{self._total} | {stated} | {left} left", file=self._file, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
