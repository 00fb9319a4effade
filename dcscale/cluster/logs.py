"""The log of each rank, so that the terminal of a run with many ranks shows one of them."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
import sys
from pathlib import Path
from typing import Any, TextIO


class RankLog:
    """Appends all that this process prints to ``RUN/logs/rank-N.log``; rank 0's lines also stay on the terminal.

    On other ranks the file takes the place of stdout and stderr, also for libraries that are not written in Python.
    Neither a full disk nor a terminal that is gone raises: printing must not end a run.

    Args:
        run: the run folder.
        rank: this process's rank.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, run: Path, rank: int) -> None:
        self.path = run / "logs" / f"rank-{rank}.log"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._streams = sys.stdout, sys.stderr
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        _append(self._file, f"--- started {now} as process {os.getpid()} on {socket.gethostname()}\n")
        self._terminal: int | None = None
        if rank != 0:
            for stream in self._streams:
                stream.flush()
            self._descriptors = {number: os.dup(number) for number in (1, 2)}
            for number in self._descriptors:
                os.dup2(self._file, number)
            self._terminal = self._descriptors[2]
        sys.stdout, sys.stderr = (_Stream(stream, self._file, shown=rank == 0) for stream in self._streams)

    @property
    def descriptor(self) -> int:
        """The open file, for what writes without Python."""
        return self._file

    def write(self, text: str) -> None:
        """Writes a text to the log only."""
        _append(self._file, text)

    def error(self, text: str) -> None:
        """Prints a text to the log and to the terminal, on every rank."""
        print(text, file=sys.stderr, flush=True)
        if self._terminal is not None:
            _append(self._terminal, text + "\n")

    def close(self) -> None:
        """Prints to the terminal again."""
        sys.stdout, sys.stderr = self._streams
        if self._terminal is not None:
            for number, descriptor in self._descriptors.items():
                os.dup2(descriptor, number)
                os.close(descriptor)
        os.close(self._file)


class _Stream:
    """A text stream that also goes to a log, or, if it is not ``shown``, only there."""

    def __init__(self, stream: TextIO, log: int, shown: bool) -> None:
        self._stream, self._log, self._shown = stream, log, shown

    def write(self, text: str) -> int:
        if "\r" not in text:  # progress bars overwrite their line
            _append(self._log, text)
        if self._shown:
            with contextlib.suppress(OSError):  # a terminal that is gone, as after SIGHUP, or a closed pipe
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _append(descriptor: int, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk, which the reporter of metrics warns about
        os.write(descriptor, text.encode("utf-8", "replace"))
