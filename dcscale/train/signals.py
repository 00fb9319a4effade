"""Asking a run to stop: a signal, or the launcher's death, is looked at by the ranks together between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launchers(variables: Mapping[str, str] = os.environ) -> list[int]:
    """The processes that started this rank and whose loss must end it: empty for a process started alone.

    That is torchrun; or DeepSpeed's launcher on this node and the ``deepspeed`` command behind it, which
    dies of a TERM at once and leaves all others running.
    """
    if "TORCHELASTIC_RUN_ID" in variables:
        return [os.getppid()]
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no Linux /proc, or the parent is gone already
        return []
    return [os.getppid(), parent_of(os.getppid())] if b"deepspeed.launcher.launch" in command else []


def parent_of(process: int) -> int:
    """The parent of a process on this machine; 0 where it is not known."""
    try:
        # The name, in parentheses, may hold anything; state and parent follow it.
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


class StopSignals:
    """While entered, TERM, INT, USR1 and the loss of the launcher only set :attr:`received`.

    A second INT interrupts at once. The handlers that were there before are put back at the end.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._launchers = launchers()

    @property
    def received(self) -> str | None:
        """What asks to stop, or None."""
        process = os.getpid()
        for launcher in self._launchers:
            process = parent_of(process)
            if process != launcher:
                return "loss of the launcher"
        return self._signal

    @contextmanager
    def calling(self, call: Callable[[], None]) -> Iterator[None]:
        """While entered, ``call`` is made once, from a thread, when a stop is asked for; for what waits elsewhere."""
        left = threading.Event()

        def watch() -> None:
            while self.received is None:
                if left.wait(_SECONDS_BETWEEN_LOOKS):
                    return
            call()

        thread = threading.Thread(target=watch, name="dcscale-stop", daemon=True)
        thread.start()
        try:
            yield
        finally:
            left.set()
            thread.join()

    def __enter__(self) -> StopSignals:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal == "SIGINT":
            raise KeyboardInterrupt
        self._signal = signal.Signals(number).name
