"""Trains for some minutes while ranks are killed at random moments, and starts again as a job script would.

The ranks are processes of this machine, started without a launcher, so that their exit codes can be seen, and SIGKILL
of one rank leaves it to the others to notice.
"""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dcscale.bench.goodput.times import KILLS
from dcscale.config import load_arguments
from dcscale.files import write_json

AGAIN = (75, 76)
"""Exit codes after which the same command resumes: RESUME and RETRY of ``dcscale.cluster.ending.ExitCode``."""

POLL_SECONDS = 0.05


class LiveError(RuntimeError):
    """The run ended in a way that starting it again does not help."""


@dataclass
class Start:
    """One start of the run. Times are seconds since the epoch."""

    began: float
    killed: float | None = None
    """When a rank was killed; None: none was."""

    rank: int | None = None
    """The rank that was killed."""

    ended: float = 0.0
    """When the last of its processes had ended."""

    codes: list[int] = field(default_factory=list)
    """Exit code of each rank; -9: killed."""


def train_with_kills(
    program: Path,
    settings: Sequence[str],
    *,
    minutes: float,
    mean_seconds: float,
    ranks: int = 2,
    seed: int = 0,
    grace_seconds: float = 10.0,
    log: Path,
    say: Callable[[str], None] = print,
) -> list[Start]:
    """Runs ``program`` again and again until ``minutes`` have passed, then stops it with SIGTERM.

    Args:
        program: launch/train.py.
        settings: config files and ``key=value``.
        minutes: wall-clock minutes in all.
        mean_seconds: mean seconds between kills, which come at exponentially distributed times: also while the ranks
            start, and none while nothing runs.
        ranks: processes.
        seed: of the times and ranks.
        grace_seconds: after the first rank has ended, the others have so long before SIGTERM, and again before SIGKILL;
            a launcher does the same (srun --wait).
        log: the output of the ranks is appended to it.
        say: prints a line.

    Returns:
        All starts, in order.

    Raises:
        LiveError: an exit code says that the run must not be started again, or it completed before the time was up.
    """
    generator = random.Random(seed)
    end = time.time() + 60 * minutes
    kill_at = time.time() + generator.expovariate(1 / mean_seconds)
    starts: list[Start] = []
    with log.open("ab") as output:
        while True:
            start = Start(time.time())
            starts.append(start)
            processes = _launch(program, settings, ranks, output)
            try:
                while any(process.poll() is None for process in processes):
                    if time.time() >= end:
                        _send(processes, signal.SIGTERM)
                        _wait(processes, 6 * grace_seconds)
                        break
                    if time.time() >= kill_at:
                        kill_at = time.time() + generator.expovariate(1 / mean_seconds)
                        start.rank, start.killed = generator.randrange(ranks), time.time()
                        _send([processes[start.rank]], signal.SIGKILL)
                    if any(process.poll() is not None for process in processes):
                        _wait(processes, grace_seconds)
                        break
                    time.sleep(POLL_SECONDS)
            finally:
                _send(processes, signal.SIGKILL)
                start.codes = [process.wait() for process in processes]
            start.ended = time.time()
            say(_line(start, starts[0].began))
            if time.time() >= end:
                return starts
            while kill_at <= time.time():
                kill_at += generator.expovariate(1 / mean_seconds)
            own = [code for code in start.codes if code >= 0]
            if any(code not in AGAIN for code in own) or not (own or start.killed):
                raise LiveError(
                    f"start {len(starts)} ended with the codes {start.codes}, after which a run is not started again: "
                    f"read {log}, or raise train.steps if the run was complete"
                )


def train_live(
    program: Path, settings: Sequence[str], minutes: float, mean_seconds: float, ranks: int, seed: int
) -> Path:
    """Trains a new run with :func:`train_with_kills`, and writes when it was killed into RUN/kills.json.

    Returns:
        The run folder; the output of the ranks is in its live.log.

    Raises:
        ConfigError: the settings cannot be read.
        LiveError: the run exists already, or as :func:`train_with_kills`.
    """
    run = Path(load_arguments(settings).config.run.folder)
    if (run / "checkpoints").exists():
        raise LiveError(f"run.folder = {run}: has a run already; give a new folder, so that only this run is measured")
    run.mkdir(parents=True, exist_ok=True)
    log = run / "live.log"
    print(f"training for {minutes:g} minutes in {run}, output in {log}", flush=True)
    starts = train_with_kills(
        program, settings, minutes=minutes, mean_seconds=mean_seconds, ranks=ranks, seed=seed, log=log, say=_print
    )
    facts = {"minutes": minutes, "mean_seconds": mean_seconds, "ranks": ranks, "seed": seed}
    write_json(run / KILLS, {"format": 1, **facts, "starts": [asdict(start) for start in starts]})
    return run


def _print(line: str) -> None:
    print(line, flush=True)


def _launch(program: Path, settings: Sequence[str], ranks: int, output: object) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    return [
        subprocess.Popen(
            [sys.executable, str(program), *settings],
            env={**os.environ, **meeting, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=output,  # type: ignore[arg-type]
            stderr=subprocess.STDOUT,
        )
        for rank in range(ranks)
    ]


def _send(processes: Sequence[subprocess.Popen], number: int) -> None:
    for process in processes:
        process.send_signal(number)  # does nothing to a process that has ended


def _wait(processes: Sequence[subprocess.Popen], seconds: float) -> None:
    """Waits until all have ended; after ``seconds`` the others get SIGTERM, and after as long again SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.time() + seconds
        while time.time() < deadline and any(process.poll() is None for process in processes):
            time.sleep(POLL_SECONDS)
        _send(processes, number)


def _line(start: Start, origin: float) -> str:
    killed = "" if start.killed is None else f", rank {start.rank} killed at {start.killed - origin:.1f} s"
    codes = " and ".join(map(str, start.codes))
    return f"  start at {start.began - origin:6.1f} s{killed}, ended at {start.ended - origin:.1f} s with {codes}"
