"""How a start of a run ends: its exit code, and ``ending.json``, which a job script decides by."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dcscale.cluster.logs import RankLog
from dcscale.files import read_json, write_atomically
from dcscale.lease import Lease, LeaseLostError, is_taken_over
from dcscale.signals import StopSignals

if TYPE_CHECKING:
    from dcscale.parallel import Environment  # imports torch

ENDING, ENDING_FORMAT = "ending.json", 1


class ExitCode(IntEnum):
    """What the starter of a run, a person or a job script, should do next."""

    DONE = 0
    """The run is complete, or ``train.stop_after`` was reached."""

    FAILED = 1
    """An error of the program."""

    UNFIT = 2
    """Settings, data or checkpoint do not fit: starting again would fail again."""

    DIVERGED = 3
    """Losses or gradients are not finite, or spike, and the config says to stop."""

    RESUME = 75
    """Stopped on request with a checkpoint: the same command resumes."""

    RETRY = 76
    """A rank, worker, disk or network was lost, or a rank hangs: the same command resumes."""

    INTERRUPTED = 130
    """Ctrl-C before training, or twice."""


RANK_NAMES = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PALS_RANKID", "FLUX_TASK_RANK", "SLURM_PROCID")
LOCAL_RANK_NAMES = (
    *("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PALS_LOCAL_RANKID", "FLUX_TASK_LOCAL_ID"),
    "SLURM_LOCALID",
)
"""Environment variables that say who speaks if a process ends before its launcher is known for certain."""


class Ending:
    """Ends this process, from any thread: writes why into ``ending.json``, releases the run folder, and exits.

    It exits by ``os._exit``. The interpreter's own shutdown takes seconds, in which the process could still be killed
    by a signal and lose its exit code; and it would wait for threads and collectives that wait for a lost rank.

    What a start knows of itself is added as it learns it, by :meth:`hold`, :meth:`open_log` and the attributes.

    Args:
        exit: ends the process with a code.
        seconds: longest time between :meth:`decide` and the exit, whatever hangs; a disk, say.
        variables: environment variables.
    """

    def __init__(
        self,
        exit: Callable[[int], Any] = os._exit,
        *,
        seconds: float = 60.0,
        variables: Mapping[str, str] = os.environ,
    ) -> None:
        self.signals = StopSignals(self.signalled)
        self.rank, self.local_rank = (_first_number(variables, names) for names in (RANK_NAMES, LOCAL_RANK_NAMES))
        self.world_size, self.host = 1, socket.gethostname()
        self.run: Path | None = None
        """The run folder, once this start holds it."""
        self.lease: Lease | None = None
        """On rank 0: the lease of the run folder, also while it is being taken."""
        self.log: RankLog | None = None
        self.progress: Callable[[], tuple[int | None, Path | None]] = lambda: (None, None)
        """Optimizer steps done, None until that is known, and the newest complete checkpoint."""
        self.deviation: Callable[[], str | None] = lambda: None
        """How the collectives of this rank's last step differ from those of earlier steps; the watchdog knows."""
        self.lost_ranks: Callable[[float], Mapping[int, str]] = lambda seconds: {}
        """Ranks that gave no sign of life for so many seconds, with their hosts; the watchdog knows."""
        self.before_exit: Callable[[], None] = lambda: None
        """Flushes what other parts still hold back; may raise OSError or LeaseLostError."""
        self.code: ExitCode | None = None
        """The exit code, once it is decided."""
        self.reason = ""
        """Why, in some words."""
        self._exit, self._variables = exit, variables
        self._ending = threading.RLock()
        self._deadline = threading.Timer(seconds, lambda: self._exit(int(self.code)))
        self._wrote = False
        self._token = ""

    def know(self, environment: Environment) -> None:
        """From here on this process knows for certain who it is."""
        self.rank, self.local_rank = environment.rank, environment.local_rank
        self.world_size = environment.world_size

    def hold(self, run: Path, token: str) -> None:
        """From here on this start holds the run folder, by the lease with this token.

        Rank 0 removes the ``ending.json`` of an earlier start.
        """
        self.run, self._token = run, token
        if self.lease is not None:
            (run / ENDING).unlink(missing_ok=True)

    def open_log(self) -> None:
        """From here on this process prints into ``logs/rank-N.log`` of the run folder, see :class:`RankLog`."""
        assert self.run is not None
        self.log = RankLog(self.run, self.rank)

    def abandon(self) -> None:
        """This start has lost the run folder to another: nothing is written into it any more."""
        self.run, self.lease, self.before_exit = None, None, lambda: None
        if self.log is not None:
            self.log.close()
            self.log = None

    def signalled(self, name: str) -> None:
        """Ends the process at once after a signal: before training, or Ctrl-C a second time."""
        training = self.signals.received is not None
        code = ExitCode.INTERRUPTED if name == "SIGINT" else ExitCode.RESUME
        reason = f"{name} again, while stopping" if training else f"{name} before training"
        self.decide(code, reason)
        if (ended := self.read()) is not None:  # another rank may have failed, and srun sent SIGTERM because of that
            self.code = ExitCode(ended["code"])
        if self.rank == 0:
            self.error(f"stopped    by {reason}; earlier checkpoints are complete, the same command resumes from them")
        self.exit()

    def decide(
        self,
        code: ExitCode,
        reason: str,
        error: str | None = None,
        rank: int | None = None,
        host: str | None = None,
        agreed: bool = False,
    ) -> bool:
        """Decides the exit code; from here on, signals are ignored and the process ends within ``seconds``.

        Writes ``ending.json`` if this start holds the run folder, unless another rank has done so. A rank that was
        suspended, and wakes up when the next start has the folder, writes nothing into it. The first thread of the
        process to call this decides; others wait here for the end. It may decide again.

        Args:
            code: the exit code.
            reason: why, in some words.
            error: the error, if it was one.
            rank: the rank that is the cause; None: this one; -1: unknown.
            host: the host of that rank.
            agreed: all ranks decide the same now: none is the cause, and rank 0 writes ``ending.json``.

        Returns:
            Whether this rank should speak for all, if they cannot agree on it: it was the first to write
            ``ending.json``; or, where that is not written, it is the first of its node.
        """
        self._ending.acquire()
        self.signals.ignore()
        if agreed:
            rank = -1
        elif rank is None:
            rank, host = self.rank, self.host
        if self.code is None:
            self._deadline.daemon = True
            self._deadline.start()
        self.code, self.reason = code, reason
        with contextlib.suppress(OSError):  # nothing can be written either then
            if self.run is not None and is_taken_over(self.run, self._token):
                self.abandon()
        step, checkpoint = self.progress()
        content = {
            "format": ENDING_FORMAT,
            "code": int(code),
            "reason": reason,
            "rank": None if rank < 0 else rank,
            "host": host,
            "error": error,
            "step": step,
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "job_id": self._variables.get("SLURM_JOB_ID"),
            "restart_count": self._variables.get("SLURM_RESTART_COUNT"),
            "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        # A start that is refused leaves a folder without a run as it was.
        if self.run is None or not (self.run / "checkpoints").is_dir() or (agreed and self.rank != 0):
            return self.local_rank == 0
        try:
            first = self._write_first(self.run / ENDING, json.dumps(content, indent=2) + "\n")
        except OSError as failure:
            self.error(f"warning    {self.run / ENDING} cannot be written: {failure}")
            return self.local_rank == 0
        self._wrote |= first
        return first

    def _write_first(self, path: Path, content: str) -> bool:
        """Writes a file, atomically, unless another rank has done so; returns whether it was written."""
        if self._wrote:
            write_atomically(path, content)
            return True
        if path.exists():
            return False
        temporary = path.with_name(f".{path.name}.rank-{self.rank}")
        write_atomically(temporary, content)
        try:
            os.link(temporary, path)  # unlike a rename, it fails if there is one, also between hosts of a network disk
        except FileExistsError:
            return False
        except OSError:  # a disk without hard links
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        return True

    def read(self) -> dict[str, Any] | None:
        """The content of ``ending.json``, if another rank of this start has written it."""
        if self.run is None:
            return None
        try:
            content = read_json(self.run / ENDING)
        except ValueError:  # also if there is none
            return None
        valid = content.get("format") == ENDING_FORMAT and content.get("code") in list(ExitCode)
        return content if valid else None

    def error(self, text: str) -> None:
        """Prints to the terminal, on every rank, and into the log of this rank."""
        if self.log is not None:
            self.log.error(text)
            return
        with contextlib.suppress(OSError):  # a terminal that is gone must not keep the process from ending
            print(text, file=sys.stderr, flush=True)

    def exit(self) -> None:
        """Releases the run folder and ends the process with the code that was decided."""
        assert self.code is not None, "decide() comes first"
        try:
            self.before_exit()
            sys.stdout.flush()
            sys.stderr.flush()
        except (OSError, LeaseLostError) as failure:
            self.error(f"warning    while the process ended: {failure}")
        if self.lease is not None:
            self.lease.release()
        self._deadline.cancel()
        self._exit(int(self.code))


def _first_number(variables: Mapping[str, str], names: Sequence[str]) -> int:
    """The value of the first of the variables that is a number; 0 without one."""
    return next((int(value) for name in names if (value := variables.get(name, "")).isdecimal()), 0)
