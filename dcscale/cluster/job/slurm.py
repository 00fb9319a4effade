"""SLURM's commands: what it says of a job, and starting a job again."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

TRIES_AFTER = (5, 10, 20, 40)
"""Seconds of waiting before each further try, if SLURM's controller does not answer: it may just be restarted. In all
less than the time that SLURM leaves to a job script before the time limit."""

_PASSING = re.compile("contact slurm|timed out|zero bytes|connection|connect failure", re.IGNORECASE)
"""What SLURM's commands say if the controller does not answer."""

_RUNNING = ("RUNNING", "SIGNALING", "RESIZING")
"""States of a job that nobody ends."""

_USABLE = ("idle", "allocated", "mixed", "completing", "planned")
"""States of nodes that jobs get."""


class SlurmError(RuntimeError):
    """A command of SLURM failed."""


def run_command(*words: str) -> str:
    """What a command of SLURM prints.

    Raises:
        SlurmError: it failed.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    except subprocess.CalledProcessError as error:
        message = error.stderr.strip() or f"exit code {error.returncode}"
        raise SlurmError(f"{' '.join(words)}: {message}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{' '.join(words)}: {error}") from error
    return done.stdout


def patient_command(*words: str, sleep: Callable[[float], None] = time.sleep) -> str:
    """As :func:`run_command`, with further tries while SLURM's controller does not answer.

    Raises:
        SlurmError: the command failed, or nobody answered in the last try.
    """
    for seconds in TRIES_AFTER:
        try:
            return run_command(*words)
        except SlurmError as error:
            if not _PASSING.search(str(error)):
                raise
        sleep(seconds)
    return run_command(*words)


def job_number(text: str) -> str:
    """The number of the job in what ``sbatch --parsable`` prints, which a site may put lines of its own before.

    Raises:
        SlurmError: there is none.
    """
    numbers = re.findall(r"^(\d+)(?:;\S*)?$", text, re.MULTILINE)
    if not numbers:
        raise SlurmError(
            f"sbatch prints no number of a job, but {printable(text)!r}: look whether squeue shows the job"
        )
    return numbers[-1]


def printable(text: Any) -> str:
    """A text of a file on one line, without what could control the terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))[:300]


class Job:
    """This job, as SLURM sees it.

    Args:
        variables: environment of the job script.
        command: runs a command of SLURM, returns what it prints.

    Raises:
        SlurmError: SLURM cannot be asked.
    """

    def __init__(self, variables: Mapping[str, str], command: Callable[..., str] = run_command):
        self._command = command
        # The last task of an array has the number of the array as its own, which would name all of them.
        array, task = (variables.get(f"SLURM_ARRAY_{name}_ID", "") for name in ("JOB", "TASK"))
        self.name = f"{array}_{task}" if array else variables.get("SLURM_JOB_ID", "")
        if not self.name:
            raise SlurmError("SLURM_JOB_ID is not set")
        self._ask()

    def _ask(self) -> None:
        fields = "--format=%T;%r;%P;%D;%n;%f;%x"
        words = ("squeue", "--noheader", f"--jobs={self.name}", "--states=all", fields)
        (values,) = _table(self._command(*words), 7, 1)
        self.state, self.reason, self._partition, nodes, self._required, self._features, self._excluded = values
        self._nodes = int(nodes) if nodes.isdecimal() else 1

    def ended_by_slurm(self) -> str:
        """Why SLURM ends this start itself; empty while it runs, or if its time limit is over."""
        if self.state in _RUNNING or self.reason == "TimeLimit" or self.state == "TIMEOUT":
            return ""
        return (
            f"SLURM has ended the job itself ({self.state}), as after scancel, so this script does not start it again"
        )

    def excludable(self, hosts: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """The names of those nodes that the job can do without; and of the other hosts, why not.

        A job that excludes all nodes of its partition would wait for ever.

        Raises:
            SlurmError: SLURM cannot be asked.
        """
        why_not: dict[str, str] = {}
        if self._required:
            return [], dict.fromkeys(hosts, f"the job asks for {self._required}")
        if not re.fullmatch(r"[\w.-]*", self._features):
            return [], dict.fromkeys(hosts, f"which nodes fit the constraint {self._features} is not known")
        query = ("sinfo", "--noheader", "--Node", f"--partition={self._partition}", "--format=%N;%T;%f")
        table = _table(self._command(*query), 3)
        known = {name for name, _, _ in table}
        usable = {
            name
            for name, state, features in table
            if state.rstrip("~#%$@^-+") in _USABLE and (not self._features or self._features in features.split(","))
        } - self._excluded_already()
        spare = len(usable) - self._nodes
        few = f"the job needs {self._nodes} of the nodes in {self._partition}, of which {len(usable)} can be used"
        chosen: list[str] = []
        for host in hosts:
            # A host may know itself by a longer name than SLURM does.
            name = host if host in known else host.partition(".")[0]
            if name not in known:
                why_not[host] = f"{self._partition} has no node of this name"
            elif name in usable and spare < 1:
                why_not[host] = few
            else:
                chosen.append(name)
                spare -= name in usable
        return chosen, why_not

    def _excluded_already(self) -> set[str]:
        return set(self._command("scontrol", "show", "hostnames", self._excluded).split()) if self._excluded else set()

    def requeue(self) -> None:
        """Starts the job again, as soon as its script has ended.

        Raises:
            SlurmError: SLURM does not, or is just ending the job.
        """
        self._ask()  # again, since a job that is cancelled meanwhile would be requeued all the same
        if ended := self.ended_by_slurm():
            raise SlurmError(ended)
        self._command("scontrol", "requeue", self.name)

    def change(self, wait: int, exclude: Sequence[str]) -> None:
        """Delays the next start by ``wait`` seconds, and excludes nodes from it besides those that already are.

        After :meth:`requeue`, since only a pending job can be changed. It stays so at least until its script has ended.

        Raises:
            SlurmError: SLURM refuses it.
        """
        changes = [f"StartTime=now+{wait}"] if wait else []
        if new := [host for host in exclude if host not in self._excluded_already()]:
            changes.append(f"ExcNodeList={','.join([*[self._excluded] * bool(self._excluded), *new])}")
        if changes:
            self._command("scontrol", "update", f"JobId={self.name}", *changes)


def in_queue(job: str, command: Callable[..., str] = run_command) -> str | None:
    """The state of a job that is pending or running; None if it has ended.

    Raises:
        SlurmError: SLURM cannot be asked.
    """
    try:
        states = command("squeue", "--noheader", f"--jobs={job}", "--format=%T").split()
    except SlurmError as error:
        if "Invalid job id" in str(error):  # ended some minutes ago
            return None
        raise
    return states[0] if states else None


def _table(text: str, columns: int, rows: int | None = None) -> list[list[str]]:
    """Lines of values with ``;`` between them; ``(null)`` and ``N/A`` become empty. Raises SlurmError on others."""
    table = [line.strip().split(";") for line in text.splitlines() if line.strip()]
    if any(len(values) != columns for values in table) or rows not in (None, len(table)):
        raise SlurmError(f"its answer is not as expected: {printable(text)!r}")
    return [["" if value in ("(null)", "N/A") else value for value in values] for values in table]
