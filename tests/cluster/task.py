"""One task of a job, started by srun: ``task.py START.json``. It becomes, or stands for, a rank of ``launch/train.py``.

START.json is written by :meth:`nodes.Cluster.start`. A cold task becomes ``python launch/train.py``. Otherwise the rank
is forked from its node's server (``warm.py``), which has imported what takes seconds; this process passes signals on to
it and ends as it does.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import sys
from pathlib import Path

FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


def main(path: Path) -> None:
    start = json.loads(path.read_text())
    rank = os.environ.get("SLURM_PROCID", "0")
    arguments = start["arguments"].get(rank, start["arguments"]["all"])
    os.environ.update(start["environment"])
    if arguments is None:  # a rank that never arrives
        signal.pause()
    pid_file = path.with_name(f"{path.stem}.pid-{rank}")
    if start["cold"]:
        pid_file.write_text(str(os.getpid()))
        os.execv(sys.executable, [sys.executable, *arguments])
    request = {"arguments": arguments, "environment": dict(os.environ), "cwd": os.getcwd(), "faults": start["faults"]}
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(f"{start['servers']}/{os.uname().nodename}.sock")
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until it is known where to pass them on
    socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], [0, 1, 2])
    answer = connection.makefile("rb")
    (pid,) = struct.unpack("i", answer.read(4))
    pid_file.write_text(str(pid))
    for number in FORWARDED:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
    status = struct.unpack("i", answer.read(4))[0]
    if status < 0:
        if -status in FORWARDED:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
