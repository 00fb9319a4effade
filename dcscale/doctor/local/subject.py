"""What the doctor looks at: this machine, and the run that a config describes; and the commands that it asks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.doctor.findings import Finding, Verdict
from dcscale.observe import printable

if TYPE_CHECKING:  # a machine can be looked at where packages are missing
    from dcscale.config import Config, ModelConfig

GIB = 1 << 30


@dataclass
class Subject:
    """This machine, the run, and how its ranks are spread."""

    config: Config | None = None
    """Settings of the run, which have passed ``check_config``; None: only the machine is checked."""

    ranks: int = 1
    """Of the run."""

    local_ranks: int = 1
    """On this machine."""

    nodes: int = 1
    """Machines of the run."""

    place: Callable[[], tuple[int, int, int]] | None = None
    """Finds ``ranks``, ``local_ranks`` and ``nodes``, as :func:`spread` does; None: they are given."""

    count: Callable[[ModelConfig], int] | None = None
    """Counts the parameters of a model; None: they are not known."""

    preflight: Callable[[Config, int], tuple[list[str], int]] | None = None
    """Finds the reasons why a run on so many ranks could not start, and how many warnings it would begin with."""

    quick: bool = False
    """Whether only what takes less than 2 s is wanted."""

    together: bool = False
    """Whether the machines are checked together, which finds out what they share."""

    node: str = field(default_factory=socket.gethostname)
    variables: Mapping[str, str] = field(default_factory=lambda: os.environ)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _parameters: int | None = field(default=None, repr=False)

    @property
    def run(self) -> Path | None:
        """The run folder; None without a config."""
        return None if self.config is None else Path(self.config.run.folder).absolute()

    def parameters(self) -> int | None:
        """Parameters of the model, counted once; None if they are not known."""
        with self._lock:
            if self._parameters is None and self.config is not None and self.count is not None:
                try:
                    self._parameters = self.count(self.config.model)
                except ImportError:  # what is missing is a finding of its own
                    return None
            return self._parameters

    def good(self, check: str, value: str, rule: str) -> Finding:
        return Finding(check, Verdict.GOOD, self.node, value, rule)

    def bad(self, check: str, value: str, rule: str, way_out: str) -> Finding:
        return Finding(check, Verdict.BAD, self.node, value, rule, way_out)

    def unknown(self, check: str, why: str, rule: str) -> Finding:
        return Finding(check, Verdict.UNKNOWN, self.node, why, rule)

    def judged(self, fits: bool, check: str, value: str, rule: str, way_out: str) -> Finding:
        """A good finding, or a bad one with its way out."""
        return self.good(check, value, rule) if fits else self.bad(check, value, rule, way_out)


def spread(variables: Mapping[str, str] = os.environ, gpus: int = 0) -> tuple[int, int, int]:
    """Ranks of the run, ranks on this machine and machines, from the launcher's variables.

    A machine has at least as many ranks as GPUs, since the doctor itself may run as one task a node.

    Args:
        variables: environment variables.
        gpus: GPUs of this machine.

    Raises:
        LaunchError: the variables are inconsistent.
        ModuleNotFoundError: torch is not installed.
    """
    from dcscale.parallel.launchers import recognise

    found, _ = recognise(variables)
    nodes = -(-found.world_size // found.local_world_size)
    local_ranks = max(found.local_world_size, gpus)
    return max(found.world_size, nodes * local_ranks), local_ranks, nodes


def visible_gpus(variables: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """GPUs that a run would see on this machine, without asking the driver, which may hang."""
    present = sum(path.name.removeprefix("nvidia").isdecimal() for path in devices.glob("nvidia*"))
    chosen = variables.get("CUDA_VISIBLE_DEVICES")
    return present if chosen is None else min(present, len([name for name in chosen.split(",") if name.strip()]))


def size(count: float) -> str:
    """Bytes for people: ``512 MiB``."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:,.3g} {unit}"
        count /= 1024
    raise AssertionError


def counted(number: int, name: str) -> str:
    """``1 rank``, ``2 ranks``."""
    return f"{number:,} {name}{'s' * (number != 1)}"


# -- commands, which may be missing, fail or hang ----------------------------------------------------------------------

_MOST_BYTES = 1 << 22
"""Of an output: far more than any of these commands prints."""


class CommandError(RuntimeError):
    """A command gave no answer.

    Args:
        message: why.
        missing: whether it is not installed.
    """

    def __init__(self, message: str, *, missing: bool = False) -> None:
        super().__init__(message)
        self.missing = missing


def run_command(*command: str, seconds: float, variables: Mapping[str, str] = os.environ) -> str:
    """The output of a command, which runs without a shell, in the language C.

    Args:
        command: its name and arguments.
        seconds: after which it is killed, with all processes that it started.
        variables: its environment.

    Raises:
        CommandError: it is not installed, failed, or gave no answer in time.
    """
    name = command[0]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**variables, "LC_ALL": "C"},
            start_new_session=True,  # so that its children can be killed too
        )
    except FileNotFoundError:
        raise CommandError(f"{name} is not installed", missing=True) from None
    except OSError as error:
        raise CommandError(f"{name} cannot be started: {error.strerror}") from error
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        # A process that waits in the kernel, for a disk or a driver, cannot be killed: it is not waited for.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=0.5)
        raise CommandError(f"{name} gave no answer in {seconds:g} s") from None
    text = output[:_MOST_BYTES].decode(errors="replace")
    if process.returncode:
        first = next((line.strip() for line in text.splitlines() if line.strip()), "it printed nothing")
        raise CommandError(f"{name} failed with exit code {process.returncode}: {printable(first)[:200]}")
    return text
