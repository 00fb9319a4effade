"""Imports torch, DeepSpeed and dcscale once, and then forks the ranks of all jobs, on all nodes of a cluster.

So a rank starts in a second instead of ten. For each line "PID SOCKET" on its standard input, a server enters the
namespaces of that process, a node's first, and listens there for tasks (``task.py``). Each rank joins the control group
of the task that asked for it, so that SLURM ends it as its own, and dies with that task. ``faults.py`` may change it
before ``launch/train.py`` runs.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

FREEZER = Path("/sys/fs/cgroup/freezer")


def main() -> None:
    import faults

    import dcscale.testing.starts  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid, path = line.split()
        if os.fork() == 0:
            enter(int(pid))
            if os.fork() == 0:  # only a child is in the PID namespace
                serve(path, faults.install)
            os._exit(0)


def enter(pid: int) -> None:
    """Enters the namespaces of a process, as nsenter does."""
    flags = 0x00020000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # mount, UTS, IPC, PID, network
    if ctypes.CDLL(None, use_errno=True).setns(os.pidfd_open(pid), flags):
        raise OSError(ctypes.get_errno(), f"the namespaces of process {pid} cannot be entered")


def serve(path: str, install: Callable) -> None:
    """Forks a rank for each task that connects to a socket; does not return."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            guard(connection, install)  # does not return
        connection.close()


def guard(connection: socket.socket, install: Callable) -> None:
    """Forks the rank, tells the task its pid and at last its status; ends it when the task is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    text, fds, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    task, _, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    join_control_group(task)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
            os.close(fd)
        run(json.loads(text), install)
    for fd in fds:
        os.close(fd)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the task passes them on to the rank
    connection.sendall(struct.pack("i", pid))
    process = os.pidfd_open(pid)
    ready, _, _ = select.select([process, connection], [], [])
    if process not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if process in ready:
        connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def join_control_group(task: int) -> None:
    """Moves this process to where SLURM's proctrack/cgroup plugin has put ``task``."""
    for line in Path(f"/proc/{task}/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "freezer" and group != "/":
            (FREEZER / group.lstrip("/") / "cgroup.procs").write_text(str(os.getpid()))


def run(request: dict, install: Callable) -> None:
    """What ``python launch/train.py ...`` would do in a new process; does not return."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    sys.argv = request["arguments"]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    install(request["faults"])
    code: Any = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as ending:
        code = ending.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    # As a new process would end, which waits for its threads; but the frames below are the server's.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    main()
