"""What a run would find: its shards, what a start would refuse, and what earlier starts have left."""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcscale.cluster.ending import ENDING, ENDING_FORMAT, ExitCode
from dcscale.doctor.findings import Finding
from dcscale.doctor.local.subject import Subject, counted, size
from dcscale.files import TEMPORARY_PREFIX, process_stat, read_json
from dcscale.lease import LEASE, LeaseTimes, describe_holder, holder_of

if TYPE_CHECKING:
    from dcscale.config import Config

# -- data, and the start -----------------------------------------------------------------------------------------------

_SECONDS = 2.0
"""For reading shards of a root: at least one is read, and as many more as fit into the time."""

_LEAST_BYTES = 8 << 20
"""For a rate of reading to mean something."""

_SERVER_SECONDS = 10.0
"""Longest wait for a server that does not answer."""


def check_shards(subject: Subject, seconds: float = _SECONDS) -> Iterator[Finding]:
    """Opens first and last shard of each root of training and validation data, and verifies shards.

    Reads the first, the last, and then others at random, as a run reads them: with size, SHA-256, and, of token shards,
    every count and token id. Caches are neither used nor filled.

    Args:
        subject: this machine and the run; without a config there is nothing to check.
        seconds: after which no further shard of a root is begun.
    """
    if subject.config is None:
        return
    for setting, root in roots(subject.config):
        yield from _root(subject, subject.config, setting, root, seconds)


def roots(config: Config) -> list[tuple[str, str]]:
    """Setting and root of all data of a run."""
    sources = [("data.sources", source.path) for source in config.data.sources]
    found = sources or [("data.train", config.data.train)]
    if config.data.validation is not None and config.validation.interval:
        found.append(("data.validation", config.data.validation))
    return found


def _root(subject: Subject, config: Config, setting: str, root: str, seconds: float) -> Iterator[Finding]:
    from dcscale.data.errors import DataError
    from dcscale.data.shards.manifest import Manifest, read_manifest
    from dcscale.data.shards.shard import check_shards as check_sizes
    from dcscale.data.shards.shard import read_shard
    from dcscale.data.storage import RetryPolicy, Storage, StorageOptions, open_storage

    def verify(storage: Storage, manifest: Manifest, number: int) -> None:
        info, dtype, vocabulary = manifest.shards[number], manifest.dtype, config.model.vocab_size
        if manifest.text is None:
            read_shard(storage, info, dtype=dtype, vocab_size=vocabulary, verify=True)
        else:  # tokenizing would take minutes
            storage.read(info.name, info.bytes, info.sha256)

    reach = f"{setting} can be opened from this machine, with its first and last shard"
    data = config.data
    timeout, total = min(data.timeout_seconds, _SERVER_SECONDS / 2), min(data.retry_total_seconds, _SERVER_SECONDS)
    retry = RetryPolicy(timeout, data.retry_backoff_seconds, total)
    try:
        storage = open_storage(root, StorageOptions(retry))
        manifest = read_manifest(storage)
        shards = manifest.shards
        check_sizes(storage, {shards[0].name: shards[0], shards[-1].name: shards[-1]}.values())
    except (DataError, OSError) as error:
        yield _bad(subject, "shards", f"{setting}: {error}", reach)
        return
    yield subject.good("shards", f"{setting}: {len(shards):,} in {storage}", reach)

    rule = "what is read has the SHA-256, the counts and the token ids of the manifest"
    others = list(range(1, len(shards) - 1))
    random.Random(time.time_ns()).shuffle(others)
    order = list(dict.fromkeys([0, len(shards) - 1, *others]))
    start, read, verified = time.perf_counter(), 0, 0
    for number in order:
        if verified and time.perf_counter() - start > seconds:
            break
        try:
            verify(storage, manifest, number)
        except (DataError, OSError) as error:
            yield _bad(subject, "verified shards", f"{setting}: {error}", rule)
            return
        read, verified = read + shards[number].bytes, verified + 1
    speed = read / max(time.perf_counter() - start, 1e-9)
    # Small shards are read too fast to tell.
    rate = f", {size(speed)} a second" if read >= _LEAST_BYTES else ""
    value = f"{setting}: {verified:,} of {len(shards):,} intact{rate}"
    yield subject.good("verified shards", value, rule)


def check_start(subject: Subject) -> Iterator[Finding]:
    """What launch/train.py checks before it allocates the model, as tools/check_config.py does, for all ranks."""
    if subject.config is None or subject.preflight is None:
        return
    rule = "data, checkpoint, optimizer rules and run folder fit the settings"
    reasons, warnings = subject.preflight(subject.config, subject.ranks)
    for reason in reasons:
        yield _bad(subject, "start", reason, rule)
    if not reasons:
        more = f"; tools/check_config.py shows {counted(warnings, 'warning')}" if warnings else ""
        yield subject.good("start", f"a start on {counted(subject.ranks, 'rank')} would be accepted{more}", rule)


def _bad(subject: Subject, check: str, message: str, rule: str) -> Finding:
    """A finding from a message whose last part is the way out."""
    value, _, way_out = message.rpartition("; ")
    return subject.bad(check, value or way_out, rule, way_out if value else "see the message")


# -- leftovers of earlier starts ---------------------------------------------------------------------------------------

_MOST_LISTED = 8

_NEXT_STEPS = {
    ExitCode.FAILED: "read the error; RUN/logs/rank-N.log has the tracebacks of all ranks",
    ExitCode.UNFIT: "fix what the error names; starting again would fail again",
    ExitCode.DIVERGED: "change the config, such as a lower optimizer.learning_rate; see train.on_nonfinite",
    ExitCode.RETRY: "the same command resumes; if it happens again on the same host, exclude that host",
}
"""After exit codes that mean that something was wrong."""


def check_leftovers(subject: Subject, processes: Callable[[], list[Process]]) -> Iterator[Finding]:
    """Lease, unfinished checkpoints and the last ending of the run folder, and processes of this machine.

    Args:
        subject: this machine and the run; without a config, only processes are looked at.
        processes: those of training on this machine.
    """
    yield _processes(subject, processes())
    if subject.run is None or not os.path.isdir(subject.run):
        return
    yield _lease(subject, subject.run)
    yield from _unfinished(subject, subject.run)
    yield from _last_ending(subject, subject.run)


def _processes(subject: Subject, found: list[Process]) -> Finding:
    rule = "no other training on this machine, which would share its cores, GPUs and ports"
    texts = []
    for process in found[:_MOST_LISTED]:
        held = [f"port {port}" for port in listening_ports(process.pid)[:4]]
        held += [f"GPU {gpu}" for gpu in held_gpus(process.pid)]
        texts.append(f"{process}{' holds ' if held else ''}{', '.join(held)}")
    more = f"; {len(found) - _MOST_LISTED} more" if len(found) > _MOST_LISTED else ""
    way_out = f"wait for it; or, if it is left of an earlier run: kill {' '.join(str(p.pid) for p in found)}"
    return subject.judged(not found, "other training", ("; ".join(texts) + more) or "none", rule, way_out)


def _lease(subject: Subject, run: Path) -> Finding:
    rule, path = "no start holds the run folder", run / LEASE
    text = describe_holder(run)
    if text is None:
        return subject.good("lease", "nobody holds the run folder", rule)
    way_out = "wait until that run ends, stop it, or use another run.folder"
    try:
        holder, expire = holder_of(run), LeaseTimes.expire
        if holder is not None and holder.is_gone():
            return subject.good("lease", text, rule)
        # Both times are of the disk's clock, so that the clocks of two machines are not compared.
        with tempfile.NamedTemporaryFile(prefix=".doctor-", dir=run) as file:
            file.write(b"now")
            file.flush()
            age = Path(file.name).stat().st_mtime - path.stat().st_mtime
    except OSError as error:
        value = f"{text}; when it was renewed is not known: {(error.strerror or str(error)).lower()}"
        return subject.bad("lease", value, rule, way_out)
    if age > expire:
        value = f"{text}; but it was not renewed for {age:,.0f} s: a start waits {expire:g} s, then takes it over"
        return subject.good("lease", value, rule)
    return subject.bad("lease", f"{text}; renewed {max(0.0, age):.0f} s ago", rule, way_out)


def _unfinished(subject: Subject, run: Path) -> Iterator[Finding]:
    """They are removed by the next save: good, but they take space."""
    rule = "none, or of a start that has ended: the next save removes them"
    found = sorted((run / "checkpoints").glob(TEMPORARY_PREFIX + "*"))
    if found:
        taken = sum(_bytes(folder) for folder in found)
        names = ", ".join(folder.name for folder in found[:_MOST_LISTED])
        yield subject.good("unfinished checkpoints", f"{len(found)}, {size(taken)}: {names}", rule)
    else:
        yield subject.good("unfinished checkpoints", "none", rule)


def _bytes(folder: Path) -> int:
    """Of all files, without those that a run is just renaming or removing."""
    total = 0
    for base, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.path.getsize(os.path.join(base, name))
    return total


def _last_ending(subject: Subject, run: Path) -> Iterator[Finding]:
    rule = "the last start of the run is complete, or was stopped on request"
    path = run / ENDING
    if not path.exists():
        return
    try:
        content = read_json(path)
        if content.get("format") != ENDING_FORMAT:
            raise ValueError(f"{path} has format {content.get('format')!r}, this version reads {ENDING_FORMAT}")
        if content.get("code") not in list(ExitCode):
            codes = ", ".join(str(int(code)) for code in ExitCode)
            raise ValueError(f"{path} has code {content.get('code')!r}, this version knows {codes}")
        code = ExitCode(content["code"])
    except ValueError as error:
        yield subject.unknown("last start", str(error), rule)
        return
    parts = [f"exit code {int(code)}: {content.get('reason')}"]
    for name in ("rank", "host", "step", "time"):
        if content.get(name) is not None:
            parts.append(f"{name} {content[name]}")
    error = content.get("error")
    if isinstance(error, str) and error.strip():
        lines = error.strip().splitlines()
        parts.append(lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}")
    value = ", ".join(parts)
    value = value if len(value) <= 400 else value[:397] + "..."
    way_out = _NEXT_STEPS.get(code, "")
    yield subject.judged(code not in _NEXT_STEPS, "last start", value, rule, way_out)


# -- processes, from /proc ---------------------------------------------------------------------------------------------

_LISTEN = "0A"
"""State of a listening socket in ``/proc/net/tcp``."""


@dataclass(frozen=True)
class Process:
    """A process that trains, or trained."""

    pid: int
    command: str
    """Its arguments, shortened."""

    state: str
    """Letter of the kernel, such as R, S, T (stopped), D (waits for a disk or driver)."""

    job: str = ""
    """SLURM job that it is of, if any."""

    def __str__(self) -> str:
        states = {"D": ", waits in the kernel for a disk or driver", "T": ", stopped"}
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} ({self.command}{job}{states.get(self.state, '')})"


def training_processes(proc: Path = Path("/proc")) -> list[Process]:
    """This user's processes that run ``launch/train.py``, without this one and those that started it.

    Those of others may be jobs with a share of this machine; what they use of its GPUs and ports is found there.
    """
    parents, found = _ancestors(), []
    for folder in proc.iterdir():
        if not folder.name.isdecimal() or int(folder.name) in parents:
            continue
        try:
            if folder.stat().st_uid != os.getuid():
                continue
        except OSError:  # it has ended
            continue
        process = _read(folder, int(folder.name))
        if process is not None and _trains(folder):
            found.append(process)
    return sorted(found, key=lambda process: process.pid)


def named_processes(pids: set[int], proc: Path = Path("/proc")) -> list[Process]:
    """These processes, as far as they still run."""
    return [process for pid in sorted(pids) if (process := _read(proc / str(pid), pid)) is not None]


def _trains(folder: Path) -> bool:
    arguments = _arguments(folder)
    # A python that runs launch/train.py itself, not an editor or a shell that has the name among its arguments.
    return (
        bool(arguments)
        and "python" in Path(arguments[0]).name
        and any(Path(argument).parts[-2:] == ("launch", "train.py") for argument in arguments[1:8])
    )


def _arguments(folder: Path) -> list[str]:
    try:
        text = (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return []
    return text.rstrip("\0").split("\0") if text else []


def _read(folder: Path, pid: int) -> Process | None:
    arguments, stat = _arguments(folder), process_stat(pid)
    if not arguments or not stat or stat[0] in "ZX":
        return None
    command = " ".join([Path(arguments[0]).name, *arguments[1:]])
    command = command if len(command) <= 80 else command[:77] + "..."
    return Process(pid, command, stat[0], _variable(folder, "SLURM_JOB_ID"))


def _variable(folder: Path, name: str) -> str:
    """An environment variable that a process in /proc was started with; empty if it is not set or not to be seen."""
    try:
        pairs = (folder / "environ").read_bytes().split(b"\0")
    except OSError:
        return ""
    values = (pair.removeprefix(f"{name}=".encode()) for pair in pairs if pair.startswith(f"{name}=".encode()))
    return next(values, b"").decode(errors="replace")


def _ancestors() -> set[int]:
    """This process and those above it."""
    found, pid = set(), os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        stat = process_stat(pid)
        pid = int(stat[1]) if stat else 0
    return found


def listeners(port: int, proc: Path = Path("/proc")) -> set[int]:
    """Processes that listen at a TCP port, of those whose files this user may see."""
    sockets = {f"socket:[{inode}]" for inode in _listening_sockets(proc, port)}
    if not sockets:
        return set()
    return {int(folder.name) for folder in proc.iterdir() if folder.name.isdecimal() and sockets & open_files(folder)}


def listening_ports(pid: int, proc: Path = Path("/proc")) -> list[int]:
    """TCP ports at which a process listens."""
    opened = open_files(proc / str(pid))
    return sorted({port for inode, port in _listening(proc) if f"socket:[{inode}]" in opened})


def held_gpus(pid: int, proc: Path = Path("/proc")) -> list[str]:
    """GPUs that a process has opened: the numbers in /dev/nvidiaN."""
    names = (name.removeprefix("/dev/nvidia") for name in open_files(proc / str(pid)) if name.startswith("/dev/nvidia"))
    return sorted({name for name in names if name.isdecimal()}, key=int)


def open_files(folder: Path) -> set[str]:
    """What the descriptors of a process in /proc point to; empty if this user may not see them."""
    found = set()
    try:
        descriptors = list((folder / "fd").iterdir())
    except OSError:
        return found
    for descriptor in descriptors:
        try:
            found.add(os.readlink(descriptor))
        except OSError:  # closed in the meantime
            continue
    return found


def _listening_sockets(proc: Path, port: int) -> set[str]:
    return {inode for inode, found in _listening(proc) if found == port}


def _listening(proc: Path) -> list[tuple[str, int]]:
    """(inode, port) of each listening TCP socket."""
    found = []
    for name in ("tcp", "tcp6"):
        try:
            lines = (proc / "net" / name).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()  # NUMBER LOCAL-ADDRESS:PORT REMOTE STATE ... INODE, which is the tenth
            if len(fields) > 9 and fields[3] == _LISTEN:
                found.append((fields[9], int(fields[1].rpartition(":")[2], 16)))
    return found
