"""Stop requests: a signal, or the death of the launcher.

Python runs a signal handler between two instructions of the main thread, which may be inside a C function for minutes:
joining the process group, in a collective, loading a library. So the handlers here do nothing, and a thread learns from
a socket which signals arrived (``signal.set_wakeup_fd``).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dcscale.files import process_stat

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""What batch systems, launchers, terminals and lost connections send to end a program."""

LOST_LAUNCHER = "loss of the launcher"


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
    stat = process_stat(pid)
    return int(stat[1]) if stat else 0


class StopSignals:
    """Context manager that turns signals and the death of a launcher into calls of ``end``, or into a request to stop.

    At first any of them calls ``end`` at once. From :meth:`deferred` on, the first is only noted in :attr:`received`,
    until the ranks can agree on it between two steps; a second SIGINT still calls ``end``. After :meth:`ignore` nothing
    happens. A SIGHUP that is ignored already, as under ``nohup``, stays so. The previous handlers are restored on exit.

    Args:
        end: called with the name of the signal, from a thread; it is expected to end the process.
        poll_seconds: how often the thread looks for the launcher.
    """

    def __init__(self, end: Callable[[str], object], *, poll_seconds: float = 0.5) -> None:
        self.started = time.monotonic()
        """When this was made, by ``time.monotonic()``; in ``launch/train.py`` when the process began."""
        self._end, self._poll_seconds = end, poll_seconds
        self._launchers = launcher_pids()
        self._deferred = self._ignored = self._interrupted = False
        self._received: str | None = None
        self._lock, self._callback_lock = threading.RLock(), threading.Lock()
        self._callback: Callable[[], None] | None = None
        self._receiver: socket.socket | None = None

    @property
    def received(self) -> str | None:
        """Name of the signal, or :data:`LOST_LAUNCHER`, that requests a stop; None without a request."""
        self._take()
        return self._received

    @contextmanager
    def deferred(self, callback: Callable[[], None]) -> Iterator[None]:
        """From here on a stop is only requested, see :attr:`received`.

        Within the context ``callback`` is called once, from the thread, when that happens: it lets a stop request
        interrupt the main thread's wait for data.
        """
        self._deferred, self._callback = True, callback
        try:
            yield
        finally:
            with self._callback_lock:  # a call in progress ends first
                self._callback = None

    def ignore(self) -> None:
        """From here on signals do nothing, since the process ends anyway."""
        self._ignored = True

    def __enter__(self) -> StopSignals:
        self._receiver, self._sender = socket.socketpair()
        self._receiver.setblocking(False)
        self._sender.setblocking(False)
        self._previous_fd = signal.set_wakeup_fd(self._sender.fileno(), warn_on_full_buffer=False)
        self._previous: dict[int, Any] = {}
        for number in STOP_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, lambda number, frame: None)
        self._left = False
        self._thread = threading.Thread(target=self._watch, name="dcscale-stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        self._left = True
        self._sender.send(b"\0")  # wakes the thread
        self._thread.join()
        self._sender.close()
        self._receiver.close()
        self._receiver = None

    def _watch(self) -> None:
        arrivals = select.poll()  # unlike select.select, it takes any number of open files
        arrivals.register(self._receiver, select.POLLIN)
        while not self._left:
            arrivals.poll(1000 * self._poll_seconds)
            self._take()
            if self._received is None and self._launcher_is_lost():
                self._handle(LOST_LAUNCHER)
            if self._received is not None:
                with self._callback_lock:
                    callback, self._callback = self._callback, None
                    if callback is not None:
                        callback()

    def _take(self) -> None:
        """Handles the signals that have arrived. Any thread may call it."""
        if self._receiver is None:  # not entered
            return
        with self._lock:  # until they are handled, so that whoever asks next knows of them
            try:
                numbers = self._receiver.recv(4096)  # a byte for each signal that has a Python handler
            except BlockingIOError:
                return
            for number in numbers:
                if number in STOP_SIGNALS:
                    self._handle(signal.Signals(number).name)

    def _handle(self, name: str) -> None:
        if self._ignored:
            return
        interrupt = name == "SIGINT"
        if not self._deferred or (interrupt and self._interrupted):
            self._end(name)
        else:
            self._interrupted |= interrupt
            self._received = self._received or name

    def _launcher_is_lost(self) -> bool:
        # An orphaned process gets another parent, so a changed parent means that the launcher has died.
        pid = os.getpid()
        for launcher in self._launchers:
            pid = parent_pid(pid)
            if pid != launcher:
                return True
        return False
