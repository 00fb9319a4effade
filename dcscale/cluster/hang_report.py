"""What a rank writes down when the run hangs: the stacks of its threads, and its collectives."""

from __future__ import annotations

import site
import sys
import sysconfig
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path

from dcscale.cluster.flight_recorder import Collective
from dcscale.cluster.verdict import Answer

_LIBRARIES = (sysconfig.get_paths()["stdlib"], *site.getsitepackages())

_STATES = {
    "": "its process is gone",
    "T": "its process is stopped, as by SIGSTOP or Ctrl-Z",
    "t": "its process is stopped by a debugger",
    "D": "its process waits for a disk or a device",
}


def process_text(state: str) -> str:
    """What a state letter of ``/proc/PID/stat`` says about a rank that does not answer; empty: no such process."""
    return _STATES.get(state, "its process runs, so a call in C may hold the lock of Python: its stack is in its log")


def describe_main_thread() -> str:
    """Where the main thread is: ``FILE:LINE in FUNCTION``, and from where that was called, if it is in a library."""
    frame = sys._current_frames()[threading.main_thread().ident]
    stack = traceback.StackSummary.extract(traceback.walk_stack(frame), lookup_lines=False)  # innermost first
    places = [f"{Path(entry.filename).name}:{entry.lineno} in {entry.name}" for entry in stack]
    own = next((number for number, entry in enumerate(stack) if not entry.filename.startswith(_LIBRARIES)), 0)
    return places[0] if own == 0 else f"{places[0]}, called from {places[own]}"


def write_report(path: Path, answer: Answer, collectives: Sequence[Collective]) -> None:
    """Writes the stacks of all threads of this process, the main thread first, and its collectives, the last first.

    Raises:
        OSError: the file cannot be written.
    """
    status = answer.status
    lines = [
        f"{status}: {status.place}, for {status.seconds:.1f} s",
        f"waits in: {answer.waiting or 'no collective'}",
        f"compared with the steps before: {answer.deviation or 'nothing different'}",
    ]
    frames = sys._current_frames()
    others = [t for t in threading.enumerate() if t not in (threading.main_thread(), threading.current_thread())]
    for thread in (threading.main_thread(), *others):
        if thread.ident in frames:
            lines += ["", f"thread {thread.name}:"]
            lines += "".join(traceback.format_stack(frames[thread.ident])).splitlines()
    lines += ["", "last collectives, the last one first:"]
    for collective in reversed(collectives):
        lines.append(f"  {'done     ' if collective.done else 'in flight'} {collective}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
