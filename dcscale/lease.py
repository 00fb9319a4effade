"""One holder of a folder at a time: ``FOLDER/lease.json``, on disks that several machines share.

The holder writes its lease again every few seconds. Another process takes it over if

- the holder ran on the same machine and its process is gone: at once;
- the holder was an earlier start of the same SLURM job, and has not renewed the lease for ``requeue`` seconds;
- anybody else has not renewed it for ``expire`` seconds.

Whoever waits counts these seconds on its own clock, from when it first saw the content that has not changed since:
clocks of two machines are never compared. A renewal that it sees ends the wait: the folder is in use.

A disk needs no locks for this, only that one of several processes can create a file, and that renaming is atomic.
A new lease is created as ``lease.json.next`` and renamed to ``lease.json`` if that is still free or expired, so that of
several processes one gets it, and a kill at any moment leaves one of the leases. A renewal writes into the holder's own
file: it never replaces the lease of a successor, and needs no space on a full disk.

A holder that was suspended, or cut off from the disk, may wake up after somebody has taken its lease over. So it calls
:meth:`Lease.check` before it changes anything in the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

from dcscale.files import parse_json, process_stat, sync_folder

LEASE = "lease.json"
_BYTES = 2048
"""Size of a lease: a renewal overwrites it with as many bytes, so that a reader never sees a part of one."""


class LeaseHeldError(RuntimeError):
    """Another process holds the folder."""


class LeaseLostError(RuntimeError):
    """Another process has taken the folder over: this one must not write to it any more."""


@dataclass(frozen=True)
class LeaseTimes:
    """Intervals of a lease, in seconds."""

    renew: float = 15.0
    """Between two renewals."""

    requeue: float = 40.0
    """Without a renewal, after which a later start of the same SLURM job takes over."""

    expire: float = 90.0
    """Without a renewal, after which anybody takes over. More than network disks cache a file, usually at most 60."""

    poll: float = 1.0
    """Between two looks at the lease of another holder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, as its lease says."""

    host: str
    pid: int
    boot_id: str
    """Of the kernel; with ``pid_namespace``, which containers have of their own, says where ``pid`` is valid."""

    pid_namespace: str
    process_start: int
    """Clock ticks after the boot; tells the holder from a later process with the same ``pid``. 0: unknown."""

    job: str
    """SLURM job id; empty without SLURM."""

    restart_count: int
    """How often SLURM has started the job again."""

    launcher: str
    since: str = ""
    """When the lease was taken, by the holder's clock; set then."""

    def __str__(self) -> str:
        started_by = [f"job {self.job}"] * bool(self.job) + [self.launcher] * bool(self.launcher)
        details = f" ({', '.join(started_by)})" if started_by else ""
        return f"process {self.pid} on {self.host}{details}, since {self.since}"

    def on_this_machine(self) -> bool:
        """Whether its process id means the same process here."""
        return (self.host, self.boot_id, self.pid_namespace) == (socket.gethostname(), _boot_id(), pid_namespace())

    def is_gone(self) -> bool:
        """Whether the process certainly does not run any more."""
        return self.on_this_machine() and not _is_running(self.pid, self.process_start)


def this_process(launcher: str = "", variables: Mapping[str, str] = os.environ) -> Holder:
    """This process as a holder."""
    count = variables.get("SLURM_RESTART_COUNT", "")  # set from the first restart on
    return Holder(
        host=socket.gethostname(),
        pid=os.getpid(),
        boot_id=_boot_id(),
        pid_namespace=pid_namespace(),
        process_start=process_state(os.getpid())[1],
        job=variables.get("SLURM_JOB_ID", ""),
        restart_count=int(count) if count.isdecimal() else 0,
        launcher=launcher,
    )


@dataclass(frozen=True)
class _Reading:
    """What is in a lease file."""

    content: bytes
    token: str | None = None
    """Random; another one for each time that a lease is taken. None, as ``holder``: the content is no lease."""

    holder: Holder | None = None

    def __str__(self) -> str:
        return "an unknown process (its lease is damaged)" if self.holder is None else str(self.holder)


class _Watch:
    """What is in a lease file, which may be missing, and how long it has not changed."""

    def __init__(self, path: Path, clock: Callable[[], float]):
        self._path, self._clock = path, clock
        self.reading, self._since = _read(path), clock()

    @property
    def seconds(self) -> float:
        return self._clock() - self._since

    def look(self) -> bool:
        """Reads the file again; returns whether it has changed."""
        before, self.reading = self.reading, _read(self._path)
        if self.reading == before:
            return False
        self._since = self._clock()
        return True


class Lease:
    """The right of this process to change a folder; a context manager. Threads may share it.

    Args:
        folder: the folder; created, with those above it, when the lease is taken.
        way_out: what the user can do if another process holds the folder; ends the message.
        holder: this process.
        print_line: called with a line for the user before waiting for another holder, and if the disk fails.
        remove_folder: remove the folder on release if nothing else is in it, even if it was there before.
        times: intervals.
        clock: seconds that never jump.
        sleep: waits for so many seconds.
    """

    def __init__(
        self,
        folder: Path,
        way_out: str,
        holder: Holder | None = None,
        print_line: Callable[[str], None] = print,
        *,
        remove_folder: bool = False,
        times: LeaseTimes = LeaseTimes(),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self._folder, self._path, self._next = folder, folder / LEASE, folder / f"{LEASE}.next"
        self._way_out, self._holder, self._print_line = way_out, holder or this_process(), print_line
        self._times, self._clock, self._sleep = times, clock, sleep
        self.token = secrets.token_hex(16)
        """Tells this holder from all others, see :func:`is_taken_over`."""
        self._renewals = 0
        self._removable = [folder] if remove_folder else []
        # Of our own file: a renewal through it can never reach the file of a successor. None: not held.
        self._file: BinaryIO | None = None
        self._released = threading.Event()
        self._loss: LeaseLostError | None = None  # of the last renewal
        self._lock = threading.Lock()  # for taking and releasing; a slow renewal holds up nobody

    def acquire(self) -> None:
        """Takes the lease and starts to renew it; waits while it is not known whether another holder still runs.

        Raises:
            LeaseHeldError: another process holds the folder. Nothing was written.
            OSError: the folder cannot be written to.
        """
        lease, next_lease, announced = _Watch(self._path, self._clock), _Watch(self._next, self._clock), False
        try:
            while not self._take_if_free(lease, next_lease):
                other = lease.reading or next_lease.reading
                if other is not None and not announced:
                    announced = True
                    seconds = self._patience(other)
                    self._print_line(
                        f"waiting    for {other}, which may still use {self._folder}: {seconds:g} s at most"
                    )
                self._sleep(self._times.poll)
                next_lease.look()
                if lease.look() and lease.reading is not None:
                    raise LeaseHeldError(f"{self._folder} is in use by {lease.reading}; {self._way_out}")
        except BaseException:
            self._remove_folders()
            raise
        threading.Thread(target=self._keep_renewing, name="dcscale-lease", daemon=True).start()

    def check(self) -> None:
        """Makes sure that this process still holds the folder; to be called before each change of it.

        Raises:
            LeaseLostError: another process has taken it over, or the lease was removed or released.
            OSError: the lease cannot be read.
        """
        current = _read(self._path)
        if current is None:  # perhaps by a successor that has ended already
            raise LeaseLostError(f"{self._folder} is not held by this process any more: {self._path} was removed")
        if not self._is_mine(current):
            raise LeaseLostError(
                f"{self._folder} was taken over by {current}: this process had not renewed its lease for too long, as "
                "it was suspended or cut off from the disk. It stops, and writes nothing more"
            )

    def raise_if_lost(self) -> None:
        """Raises LeaseLostError if the last renewal has found what :meth:`check` looks for; costs nothing."""
        if self._loss is not None:
            raise self._loss

    def release(self) -> None:
        """Stops renewing; removes the lease, and the folders that were created for it if nothing else is in them.

        Does nothing if the lease is not held. If the disk fails, prints a line and leaves the lease, which expires.
        """
        with self._lock:
            self._released.set()
            if self._file is None:
                return
            self._file.close()
            self._file = None
            try:
                if self._is_mine(_read(self._path)):
                    self._path.unlink()
                    self._remove_folders()
            except OSError as error:
                self._print_line(f"warning    {self._path} could not be removed: {error.strerror or error}")

    def __enter__(self) -> Lease:
        self.acquire()
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    # -- taking it --------------------------------------------------------------------------------------------------

    def _patience(self, other: _Reading) -> float:
        """Seconds without a change after which the lease of another holder has expired."""
        holder = other.holder
        if holder is None:
            return self._times.expire
        if holder.is_gone():
            return 0.0
        mine = self._holder
        restarted = holder.job == mine.job != "" and holder.restart_count < mine.restart_count
        return self._times.requeue if restarted else self._times.expire

    def _take_if_free(self, lease: _Watch, next_lease: _Watch) -> bool:
        if lease.reading is not None and lease.seconds < self._patience(lease.reading):
            return False
        with self._lock:
            if self._released.is_set():
                raise LeaseLostError(f"{self._folder} is not held by this process: the lease was released")
            # It is there for milliseconds, unless its process is killed just then.
            leftover = next_lease.reading
            if leftover is not None and next_lease.seconds >= self._patience(leftover) and not next_lease.look():
                self._next.unlink(missing_ok=True)
            self._create_folders()
            now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
            self._holder = replace(self._holder, since=now)
            return self._take(lease.reading)

    def _take(self, expected: _Reading | None) -> bool:
        """Puts our lease in place of ``expected``; returns False if it is not there any more, or others are at it."""
        try:
            file: BinaryIO | None = self._next.open("x+b")
        except (FileExistsError, FileNotFoundError):  # or another process removes the folder that it had created
            return False
        try:
            file.write(self._content())
            file.flush()
            os.fsync(file.fileno())
            # Where several find the leftover of a killed process, one may remove or rename the new lease of another. So
            # the file may be missing, and the token tells whose lease it is in the end.
            current = _read(self._path)
            if current == expected:
                with contextlib.suppress(FileNotFoundError):
                    os.rename(self._next, self._path)
                sync_folder(self._folder)
                current = _read(self._path)
            elif not self._is_mine(current):
                self._next.unlink(missing_ok=True)
            if not self._is_mine(current):
                return False
            self._file, file = file, None
            return True
        except BaseException:
            self._next.unlink(missing_ok=True)
            raise
        finally:
            if file is not None:
                file.close()

    def _create_folders(self) -> None:
        missing = [folder for folder in (self._folder, *self._folder.parents) if not folder.exists()]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._removable = list(dict.fromkeys([*missing, *self._removable]))

    def _remove_folders(self) -> None:
        for folder in self._removable:
            if not folder.exists() or any(folder.iterdir()):
                break
            folder.rmdir()

    def _is_mine(self, reading: _Reading | None) -> bool:
        return reading is not None and reading.token == self.token

    # -- keeping it -------------------------------------------------------------------------------------------------

    def _content(self) -> bytes:
        lease = {**asdict(self._holder), "token": self.token, "renewals": self._renewals}
        return json.dumps(lease, indent=2).ljust(_BYTES - 1).encode() + b"\n"

    def _keep_renewing(self) -> None:
        failing = False
        while not self._released.wait(self._times.renew):
            try:
                self._renew()
            except LeaseLostError as error:
                self._loss = error
                return
            except OSError as error:
                if not failing:
                    self._print_line(f"warning    {self._path} cannot be renewed: {error.strerror or error}")
                failing = True
                continue
            if failing:
                self._print_line(f"warning    {self._path} can be renewed again")
            failing = False

    def _renew(self) -> None:
        self.check()
        with self._lock:
            if self._file is None:
                return
            descriptor = os.dup(self._file.fileno())  # since release closes the file
        try:
            self._renewals += 1
            os.pwrite(descriptor, self._content(), 0)
            os.fsync(descriptor)  # network disks show it to other machines only then
        finally:
            os.close(descriptor)


def is_taken_over(folder: Path, token: str) -> bool:
    """Whether another holder than the one with ``token`` has the folder now.

    Raises:
        OSError: the lease cannot be read.
    """
    reading = _read(folder / LEASE)
    return reading is not None and reading.token != token


def holder_of(folder: Path) -> Holder | None:
    """Who holds a folder, alive or not; None: nobody, or the lease is damaged.

    Raises:
        OSError: the lease cannot be read.
    """
    reading = _read(folder / LEASE)
    return None if reading is None else reading.holder


def describe_holder(folder: Path) -> str | None:
    """Who holds a folder and what that means for a start, for the user; None: nobody does."""
    try:
        reading = _read(folder / LEASE)
    except OSError as error:
        return f"{folder / LEASE} cannot be read: {error.strerror or error}"
    if reading is None:
        return None
    if reading.holder is not None and reading.holder.is_gone():
        return f"{folder} was held by {reading}, which does not run any more: a start takes it over"
    return f"{folder} is held by {reading}: a start is refused as long as that process runs"


def _read(path: Path) -> _Reading | None:
    """The content of a lease file that anybody may have written; None if there is none."""
    try:
        with open(path, "rb") as file:
            content = file.read(2 * _BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        lease = parse_json(content, path)
        token = _checked(lease["token"], "str")
        holder = Holder(**{field.name: _checked(lease[field.name], field.type) for field in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return _Reading(content)
    return _Reading(content, token, holder)


def _checked(value: Any, type_name: Any) -> Any:
    """The value of a field. Raises ValueError if it is of another type, or could control the terminal."""
    if type(value).__name__ != type_name or (isinstance(value, str) and not value.isprintable()):
        raise ValueError(value)
    return value


def _boot_id() -> str:
    """Identifies the running kernel; empty if it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def process_state(pid: int) -> tuple[str, int]:
    """State letter and start of a process, in clock ticks after the boot; empty and 0 if they are not known."""
    stat = process_stat(pid)
    return (stat[0], int(stat[19])) if stat else ("", 0)  # the start is the 22nd field of all


def _is_running(pid: int, start: int) -> bool:
    """Whether a process of this machine with this start runs. True if it cannot be known."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True  # exists, of another user
    state, found = process_state(pid)
    if 0 not in (start, found) and start != found:
        return False
    if state not in ("Z", "X"):
        return True
    try:  # the first thread of a killed process may be a zombie while others still finish a write
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except FileNotFoundError:
        return False
