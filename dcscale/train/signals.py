"""Stop requests: a signal, or the death of the launcher. The ranks agree on them between two steps."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

_POLL_SECONDS = 0.5
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


def launcher_pids(variables: Mapping[str, str] = os.environ) -> list[int]:
    """Process ids of the launchers of this rank, parent first; empty for a process that was started directly.

    The launcher is torchrun, or DeepSpeed's per-node launcher and the ``deepspeed`` command that started it. The
    ``deepspeed`` command dies of SIGTERM immediately and leaves its workers running, so they must notice its death.
    """
    if "TORCHELASTIC_RUN_ID" in variables:
        return [os.getppid()]
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:  # no Linux /proc, or the parent has exited already
        return []
    return [os.getppid(), parent_pid(os.getppid())] if b"deepspeed.launcher.launch" in command else []


def parent_pid(pid: int) -> int:
    """The parent of a process on this machine; 0 if it is not known."""
    try:
        # /proc/PID/stat is "PID (NAME) STATE PPID ...". NAME may contain anything, also ")".
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return 0


class StopSignals:
    """Context manager in which SIGTERM, SIGINT, SIGUSR1 and the death of a launcher only set :attr:`received`.

    A second SIGINT raises KeyboardInterrupt at once. The previous handlers are restored on exit.
    """

    def __init__(self) -> None:
        self._signal: str | None = None
        self._previous: dict[int, Any] = {}
        self._launchers = launcher_pids()

    @property
    def received(self) -> str | None:
        """Name of the signal, or a description of the event, that requests a stop; None without a request."""
        # An orphaned process gets another parent, so a changed parent means that the launcher has died.
        pid = os.getpid()
        for launcher in self._launchers:
            pid = parent_pid(pid)
            if pid != launcher:
                return "loss of the launcher"
        return self._signal

    @contextmanager
    def call_on_stop(self, callback: Callable[[], None]) -> Iterator[None]:
        """Within this context, calls ``callback`` once, from a thread, when a stop is requested.

        It lets a stop request interrupt the main thread's wait for data.
        """
        left = threading.Event()

        def watch() -> None:
            while self.received is None:
                if left.wait(_POLL_SECONDS):
                    return
            callback()

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
