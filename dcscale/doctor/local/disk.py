"""The disk of the run folder: kind, atomic renames, space, inodes, speed, and its clock.

Writes at most 64 MiB, for at most 2 s, into a hidden folder that it removes again: in the run folder, or, if that is
still missing, in the nearest folder above it.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.doctor.findings import Finding
from dcscale.doctor.local.subject import Subject, size
from dcscale.files import may_succeed_later, sync_folder

if TYPE_CHECKING:
    from dcscale.config import Config

_MOST_BYTES, _BLOCK, _SECONDS = 64 << 20, 1 << 20, 2.0
_MOST_SYNC_SECONDS = 5.0
"""For a small file; leases are renewed every 15 s, and every record and checkpoint is synced."""

_MOST_SKEW = 5.0
"""Seconds; job scripts compare times in the run folder with their own."""

_LEAST_INODES = 10_000

_SHARED = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "wekafs", "glusterfs", "fuse.glusterfs", "pvfs2"),
    *("panfs", "vastnfs", "cifs", "smb3", "afs", "gfs2", "ocfs2", "fuse.juicefs", "virtiofs", "9p"),
}
"""File systems that several machines can see."""

_OBJECTS = ("s3fs", "gcsfuse", "goofys", "rclone", "mountpoint", "blobfuse", "geesefs", "s3ql", "mount-s3")
"""Parts of the names of file systems that store files as objects: a rename copies, and is not atomic."""


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted."""

    folder: str
    kind: str
    source: str


def check_disk(
    subject: Subject, mountinfo: Path = Path("/proc/self/mountinfo"), now: Callable[[], float] = time.time
) -> Iterator[Finding]:
    """Everything about the disk of the run folder.

    Args:
        subject: this machine and the run; without a config there is nothing to check.
        mountinfo: the mounted file systems, for tests.
        now: this machine's clock, for tests.
    """
    if subject.config is None or subject.run is None:
        return
    run = existing = subject.run
    try:
        existing = next(folder for folder in (run, *run.parents) if folder.exists())
        yield _file_system(subject, existing, mountinfo)
        yield from _space(subject, subject.config, run, existing)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=existing) as folder:
            yield _renames(subject, Path(folder))
            yield _sync(subject, Path(folder))
            yield _skew(subject, Path(folder), now)
            if not subject.quick:
                yield _speed(subject, subject.config, Path(folder))
    except OSError as error:
        rule, way_out = "the run folder can be written to", "free some space, change its owner, or set run.folder"
        yield subject.bad("disk write", f"{existing}: {error.strerror or error}", rule, way_out)


def mount_of(folder: Path, text: str) -> Mount | None:
    """The file system that a folder is on, from ``/proc/self/mountinfo``; None: not found."""
    real, best = os.path.realpath(folder), None
    for line in text.splitlines():
        # ID PARENT DEVICE ROOT MOUNT-POINT OPTIONS [FIELDS...] - TYPE SOURCE SUPER-OPTIONS
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(" "), after.split(" ")
        if len(fields) < 6 or len(kinds) < 2:
            continue
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), fields[4])
        inside = real == point or real.startswith(point.rstrip("/") + "/")
        if inside and (best is None or len(point) >= len(best.folder)):  # the last of several mounts is on top
            best = Mount(point, kinds[0], kinds[1])
    return best


def _file_system(subject: Subject, existing: Path, mountinfo: Path) -> Finding:
    rule = "a file system with atomic renames" + (", seen by all nodes" if subject.nodes > 1 else "")
    try:
        mount = mount_of(existing, mountinfo.read_text())
    except OSError as error:
        return subject.unknown("file system", f"{mountinfo} cannot be read: {error.strerror}", rule)
    if mount is None:
        return subject.unknown("file system", f"{existing} is on no mount of {mountinfo}", rule)
    value = f"{mount.kind} at {mount.folder}"
    if any(name in f"{mount.kind} {mount.source}" for name in _OBJECTS):
        way_out = "set run.folder to a disk or a network file system, and copy checkpoints to the object store"
        return subject.bad("file system", f"{value}: files are objects, and renames are copies", rule, way_out)
    if mount.kind == "tmpfs":
        value += ": its content is gone after a reboot"
    if mount.kind in _SHARED or subject.nodes == 1 or subject.together:
        return subject.good("file system", value, rule)
    if mount.kind.startswith("fuse"):
        return subject.unknown("file system", f"{value}: whether the other nodes see it is not known", rule)
    way_out = "set run.folder to a network file system (NFS, Lustre, ...): each node would have a folder of its own"
    return subject.bad("file system", f"{value}: a disk of this node", rule, way_out)


def checkpoint_bytes(config: Config, parameters: int) -> int:
    """Bytes of a checkpoint: the weight and two moments in float32, and the weight as the model has it."""
    return parameters * (12 + (2 if config.train.precision == "bf16" else 4))


def checkpoints_to_come(config: Config, there: int) -> int:
    """How many checkpoints the run will still add to those that are there, with the one that is being written."""
    settings = config.checkpoint
    interval = settings.interval or config.train.steps
    written = -(-config.train.steps // interval)
    if settings.keep_last is None:
        most = written
    else:
        apart = config.train.steps // settings.keep_every if settings.keep_every else 0
        # The oldest is removed only after the newest was written.
        most = min(written, settings.keep_last + 1 + (settings.keep_best or 0) + apart)
    return max(1, most - there)


def _space(subject: Subject, config: Config, run: Path, existing: Path) -> Iterator[Finding]:
    from dcscale.checkpoint.layout import checkpoints_of  # imports torch

    parameters = subject.parameters()
    try:
        disk, there = os.statvfs(existing), len(checkpoints_of(run))
    except OSError as error:
        yield subject.bad("disk space", f"{existing}: {error.strerror}", "the run folder can be read", "set run.folder")
        return
    free, total = disk.f_bavail * disk.f_frsize, disk.f_blocks * disk.f_frsize
    value = f"{size(free)} free of {size(total)}"
    if parameters is None:
        rule = "room for the checkpoints: the size of the model is not known"
        yield subject.unknown("disk space", f"{value}, but the model's parameters cannot be counted", rule)
    else:
        each, more = checkpoint_bytes(config, parameters), checkpoints_to_come(config, there)
        rule = f"at least {size(each * more)}: room for {more} more checkpoint{'s' * (more > 1)} of {size(each)}"
        way_out = "free some space, set a smaller checkpoint.keep_last, or set run.folder to a larger disk"
        yield subject.judged(free >= each * more, "disk space", value, rule, way_out)
    if disk.f_files:  # some file systems make inodes as they need them
        rule = f"at least {_LEAST_INODES:,} free, or 1 % of all"
        fits = disk.f_favail >= min(_LEAST_INODES, disk.f_files // 100)
        way_out = "remove small files from this disk, or set run.folder to another"
        yield subject.judged(fits, "inodes", f"{disk.f_favail:,} free of {disk.f_files:,}", rule, way_out)


def _renames(subject: Subject, folder: Path) -> Finding:
    """What checkpoints and leases rely on: a rename replaces, and a file is created by one process only."""
    rule = "a rename replaces a file or names a folder at once, and only one process can create a file"
    way_out = "set run.folder to another disk: checkpoints and leases would not be safe on this one"
    problems = []
    old, new = folder / "old", folder / "new"
    try:
        old.write_bytes(b"old")
        new.write_bytes(b"new")
        os.replace(new, old)
        if new.exists() or old.read_bytes() != b"new":
            problems.append("a rename did not replace a file")
        (folder / "unfinished").mkdir()
        (folder / "unfinished" / "file").write_bytes(b"content")
        (folder / "unfinished").rename(folder / "finished")
        if not (folder / "finished" / "file").is_file():
            problems.append("a rename of a folder lost its content")
        try:
            old.open("x").close()
            problems.append("a file that exists was created again")
        except FileExistsError:
            pass
    except OSError as error:
        if may_succeed_later(error):  # a full or failing disk, which is another finding
            raise
        problems.append(f"{error.strerror} ({Path(error.filename or folder).name})")
    value = "; ".join(problems) or "as expected"
    return subject.judged(not problems, "renames", value, rule, way_out)


def _sync(subject: Subject, folder: Path) -> Finding:
    rule = f"a small file is written, synced and renamed within {_MOST_SYNC_SECONDS:g} s"
    way_out = "the disk is overloaded or fails: see dmesg and the file server, or set run.folder to another"
    start = time.perf_counter()
    with open(folder / "small", "wb") as file:
        file.write(bytes(2048))
        file.flush()
        os.fsync(file.fileno())
    os.replace(folder / "small", folder / "renamed")
    sync_folder(folder)
    seconds = time.perf_counter() - start
    return subject.judged(seconds <= _MOST_SYNC_SECONDS, "disk sync", f"{seconds * 1000:.3g} ms", rule, way_out)


def _skew(subject: Subject, folder: Path, now: Callable[[], float]) -> Finding:
    """On a network disk the server sets the time of a file, so that all nodes can be compared with it."""
    rule = f"this machine and the disk differ by at most {_MOST_SKEW:g} s"
    before = now()
    (folder / "time").write_bytes(b"now")
    after, found = now(), (folder / "time").stat().st_mtime
    skew = found - after if found > after else min(0.0, found - before)
    # Kernels take a file's time from the last tick, and some disks keep no fractions of seconds.
    value = "the same" if abs(skew) < 1.1 else f"the disk's clock is {skew:+.1f} s from this machine's"
    way_out = "set the clock of this node or of the file server by NTP (chronyc makestep, as root)"
    return subject.judged(abs(skew) <= _MOST_SKEW, "clock of the disk", value, rule, way_out)


def _speed(subject: Subject, config: Config, folder: Path) -> Finding:
    block, written, start = os.urandom(_BLOCK), 0, time.perf_counter()
    with open(folder / "large", "wb", buffering=0) as file:
        while written < _MOST_BYTES and time.perf_counter() - start < _SECONDS:
            written += file.write(block)
            if written % (8 << 20) == 0:
                os.fsync(file.fileno())  # or a slow disk would get all of it at once, after the time is up
        os.fsync(file.fileno())
    speed = written / max(time.perf_counter() - start, 1e-9)
    value, parameters = f"{size(speed)} a second, with {size(written)}", subject.parameters()
    if parameters is None:
        return subject.unknown("write speed", f"{value}; the size of a checkpoint is not known", "enough to save")
    seconds, most = checkpoint_bytes(config, parameters) / speed, 60 * config.parallel.pause_timeout_minutes
    rule = f"a checkpoint is written within parallel.pause_timeout_minutes = {config.parallel.pause_timeout_minutes:g}"
    way_out = "set run.folder to a faster disk, or a longer parallel.pause_timeout_minutes"
    shown = f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    return subject.judged(seconds <= most, "write speed", f"{value}; a checkpoint takes {shown}", rule, way_out)
